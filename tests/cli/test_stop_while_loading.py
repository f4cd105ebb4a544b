"""A server that is told to stop while it loads: loading may take minutes, and nobody waits for it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kernels.cpu.build import CACHE_VARIABLE
from tests.support.models import save_tiny
from tests.support.server_process import START_SECONDS, free_port

COMPILES_FOR_EVER = '#!/bin/sh\necho $$ >> "$0.pids"\nexec sleep 600\n'


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[Path]:
    """A compiler that never ends; its processes are ended with the test."""
    path = tmp_path / "c++"
    path.write_text(COMPILES_FOR_EVER)
    path.chmod(0o700)
    yield path
    for pid in _pids(path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _pids(compiler: Path) -> list[int]:
    pids = compiler.with_name("c++.pids")
    return [int(line) for line in pids.read_text().split()] if pids.exists() else []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_ends_at_once(compiler: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "server", "serve", "--model", str(save_tiny(tmp_path / "base", "llama"))]
    command += ["--store", str(tmp_path / "store"), "--port", str(free_port()), "--device", "cpu"]
    environment = {**os.environ, "CXX": str(compiler), CACHE_VARIABLE: str(tmp_path / "cache")}
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as server:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _pids(compiler):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)  # nothing to wait on but the file
            server.send_signal(number)
            assert server.wait(timeout=10) == code
        finally:
            server.kill()
    assert "stopped_while_loading" in log.read_text()
    assert "Traceback" not in log.read_text()

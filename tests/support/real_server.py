"""The default model and the example adapters, served by `polyrank serve`: one server for all tests that ask for it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.sources import ROOT
from tests.support.server_process import free_port


@dataclass(frozen=True)
class RealServer:
    """announced: what it printed when it was ready."""

    url: str
    store: Path
    announced: str


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("real")
    port = free_port()
    options = ["--port", str(port), "--store", str(folder / "store"), "--preload", "deploy/examples/adapters"]
    options += ["--adapter-memory", "64MiB", "--adapter-root", "deploy/examples", "--merge-into-base"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYRANK_")}
    environment |= {key: value for key, value in os.environ.items() if key == "POLYRANK_CACHE"}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "server", "serve", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment)
    try:
        assert process.stdout is not None
        announced = ""
        while not announced.endswith("\n\n") or "Try:" not in announced:
            line = process.stdout.readline()
            assert line, f"the server ended: {(folder / 'log').read_text()[-2000:]}"
            announced += line
        yield RealServer(f"http://127.0.0.1:{port}", folder / "store", announced)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0  # nothing is running: less than the 30 s that running requests get
    finally:
        process.kill()
        process.communicate()

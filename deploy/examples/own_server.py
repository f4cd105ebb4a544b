"""A Polyrank server of one's own for a measurement: on a free port, with adapters, stopped at the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 600  # on a machine that builds the kernels first


@contextmanager
def own_server(adapters: Path, *options: str) -> Iterator[str]:
    """The address of a server whose store is gone afterwards; `options` are more of `polyrank serve`.

    Raises RuntimeError with the end of its log if it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "server", "serve", "--store", f"{folder}/store", "--port", str(port)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYRANK_")}
        for kept in ("POLYRANK_CACHE", "POLYRANK_KERNELS"):
            if kept in os.environ:
                environment[kept] = os.environ[kept]
        with log.open("wb") as out:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [*command, "--preload", str(adapters), *options], stdout=out, stderr=out, env=environment
            )
        try:
            _await_ready(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _await_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"The server did not come up:\n{log.read_text(errors='replace')[-2000:]}")

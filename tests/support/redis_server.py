"""A real redis-server on a free port that can be killed, emptied and frozen, and a wire to it that can go bad."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from redis import Redis
from redis.exceptions import RedisError

from tests.support.server_process import free_port

START_SECONDS = 30


def require_redis() -> None:
    """CI installs it (`make test`); a machine where that is not allowed skips, and says so."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")


class RedisServer:
    """Keeps nothing on disk: started again it is empty. Leaving the context ends it, frozen or not.

    password: what `url` and `client` send; options: of redis-server.
    """

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.password = ""
        self._options = options
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}" if self.password else f"redis://127.0.0.1:{self.port}"

    def start(self) -> Self:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "no", *self._options]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "redis.log").read_text()
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.02)  # nothing to wait on but the port
        return self

    @contextmanager
    def ended(self) -> Iterator[None]:
        """As the context of the server itself, without starting it."""
        try:
            yield
        finally:
            self.kill()

    def client(self) -> Redis:
        return Redis.from_url(self.url, socket_timeout=5)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(timeout=30)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except (OSError, RedisError):
                return False


class Wire:
    """A TCP proxy. delay: seconds that each piece of an answer is held back; garbage: what is answered instead."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self.garbage: bytes | None = None
        self.connections = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(self._listener)
        for each in list(self._open):
            self._close(each)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            with self._lock:
                self.connections += 1
                self._open |= {near, far}
            threading.Thread(target=self._carry, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, True), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                if answers and self.delay:
                    time.sleep(self.delay)  # this is the fault
                target.sendall(self.garbage if answers and self.garbage is not None else piece)
        for each in (source, target):
            self._close(each)

    def _close(self, end: socket.socket) -> None:
        with self._lock:
            self._open.discard(end)
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes who reads from it
        end.close()


def until(holds: Callable[[], object], seconds: float, what: str) -> float:
    """Polls until `holds()` is true; the seconds it took. Fails after the deadline."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - started

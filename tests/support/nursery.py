"""Real servers in a fraction of a second: children of a process that has imported all of the service already.

`python -m tests.support.nursery` reads orders from stdin, one JSON object a line, and answers each with a line. It has
one thread only, so that a child has everything but the memory of a fresh `python -m server`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import httpx

from tests.support.server_process import START_SECONDS, free_port

END_SECONDS = 60


class Nursery:
    """The process and the way to it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.support.nursery"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )

    def start(self, arguments: list[str], log: Path) -> int:
        """Begins `polyrank` with these arguments; its process id."""
        return int(self._ask({"arguments": arguments, "log": str(log)}))

    def wait(self, pid: int) -> int | None:
        """The exit code, negative for a signal; None if it has not ended for `END_SECONDS`."""
        code: int | None = self._ask({"wait": pid, "seconds": END_SECONDS})
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class BornServer:
    """`polyrank serve` as a child of the nursery, ready when the block begins."""

    def __init__(self, nursery: Nursery, *options: str, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._nursery = nursery
        self.pid = nursery.start(["serve", "--port", str(self.port), *options], log)
        self._ended = False

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int | None:
        self._ended = True
        return self._nursery.wait(self.pid)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.02)  # nothing to wait on but the port
        raise RuntimeError(f"the server is not ready:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self.signal(signal.SIGKILL)
            self.wait()


def main() -> None:
    import server.app  # noqa: F401 - what takes long
    from server import cli

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer: int | None = _wait(order["wait"], order["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                _become(order["log"])
                sys.exit(cli.run(order["arguments"]))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _become(log: str) -> None:
    """A process of its own, as a shell would start it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing, lines = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    os.dup2(lines, 1)
    os.dup2(lines, 2)


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)  # there is no waiting for a process with a limit
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    main()

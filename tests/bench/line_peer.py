"""A peer in a process of its own, in whatever environment holds it, that speaks `peers/protocol.py`."""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.peers.protocol import Request, Run, decode_run, encode

ROOT = Path(__file__).parents[2]
START_SECONDS, RUN_SECONDS, END_SECONDS = 600, 900, 30  # a first start may export a model or compile


class LinePeer:
    """Starts `python -m module arguments` and waits for its `ready` line; raises RuntimeError if none comes."""

    def __init__(self, name: str, python: str, module: str, *arguments: str, log: Path) -> None:
        self.name = name
        self._log = log
        self._buffer = b""
        command = [python, "-m", module, *arguments]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        try:
            self.facts: dict[str, str] = self._read(START_SECONDS)["ready"]
        except BaseException:
            self.close()
            raise

    def run(self, requests: Sequence[Request]) -> Run:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(requests).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self._ended()) from None
        run = decode_run(self._read(RUN_SECONDS))
        expected = sum(request.new_tokens for request in requests)
        if run.tokens != expected:
            raise RuntimeError(f"{self.name} made {run.tokens} tokens instead of {expected}")
        return run

    def close(self) -> None:
        """Its input ends, and so should it; else it is told to, and then made to."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it did not live to read
                if stream is not None:
                    stream.close()
        for end in (None, signal.SIGTERM, signal.SIGKILL):
            if end:
                self._process.send_signal(end)
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            return

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise RuntimeError(f"{self.name} said nothing for {seconds:.0f} s; its log: {self._tail()}")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise RuntimeError(self._ended())
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> str:
        return f"{self.name} ended with {self._process.wait(END_SECONDS)}; its log: {self._tail()}"

    def _tail(self) -> str:
        return " ".join(self._log.read_text(errors="replace")[-600:].split())

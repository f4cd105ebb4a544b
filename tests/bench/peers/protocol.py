"""How the bench talks to a measured process: JSON lines over its standard input and output.

The process says `{"ready": {facts}}` once, then answers each `{"requests": [...]}` with `{"run": {...}}` or with
`{"error": "..."}`, and ends when its input does. This file runs in every peer's environment: standard library only.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """One greedy answer of exactly `new_tokens` tokens. All requests of a run are sent at once."""

    prompt: str
    adapter: str | None = None
    new_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Run:
    """What one run took. `first`: seconds to each first token, `gaps`: between tokens; empty where nothing streams."""

    seconds: float
    tokens: int
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


def encode(requests: Sequence[Request]) -> str:
    return json.dumps({"requests": [asdict(request) for request in requests]})


def decode_run(answer: dict[str, Any]) -> Run:
    """The run of an answer; raises RuntimeError with the peer's words if it failed."""
    if "run" not in answer:
        raise RuntimeError(str(answer.get("error") or f"no run in {answer}"))
    return Run(**answer["run"])


def timed(generate: Callable[[list[Request]], int], requests: list[Request]) -> Run:
    """Run `generate`, which returns the number of tokens it made."""
    start = time.perf_counter()
    tokens = generate(requests)
    return Run(time.perf_counter() - start, tokens)


Peer = tuple[Callable[[list[Request]], Run], dict[str, str]]  # what runs requests, and facts to report


def serve(start: Callable[[], Peer]) -> None:
    """The peer's side: `start` loads everything.

    Libraries print to standard output as they like, so the lines get a descriptor of their own before they load.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run, facts = start()
    lines.write(json.dumps({"ready": facts}) + "\n")
    for line in sys.stdin:
        requests = [Request(**request) for request in json.loads(line)["requests"]]
        try:
            answer: dict[str, Any] = {"run": asdict(run(requests))}
        except Exception as error:  # the bench goes on with the other peers and shows this one's reason
            answer = {"error": f"{type(error).__name__}: {error}"}
        lines.write(json.dumps(answer) + "\n")

"""Peers asked in turns, so that what slows the machine for a while slows all of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from tests.bench.peers.protocol import Request, Run
from tests.bench.results import Results
from tests.bench.workload import Case

WARM_TOKENS = 4
Runs = dict[tuple[Case, str], list[Run]]


class Peer(Protocol):
    name: str
    facts: dict[str, str]

    def run(self, requests: Sequence[Request]) -> Run: ...

    def close(self) -> None: ...


def rounds(results: Results, repeat: int, peers: Sequence[Peer], cases: Sequence[Case]) -> Runs:
    """A short warm round, then the rounds that count: in each every case, and for each case every peer in turn."""
    runs: Runs = {}
    failed: set[tuple[Case, str]] = set()
    for number in range(repeat + 1):
        for case in cases:
            shape = case if number else replace(case, new_tokens=min(case.new_tokens, WARM_TOKENS))
            for peer in peers:
                key = (case, peer.name)
                if key in failed:
                    continue
                try:
                    run = peer.run(shape.requests(number))
                except RuntimeError as error:
                    failed.add(key)
                    results.skip(f"{peer.name}, {case.title}", str(error))
                    continue
                print(
                    f"{f'round {number}' if number else 'warm-up':11} {case.title}, {peer.name}: {run.rate:.1f}",
                    flush=True,
                )
                if number:
                    runs.setdefault(key, []).append(run)
    return {key: runs[key] for key in sorted(runs, key=lambda key: cases.index(key[0])) if key not in failed}

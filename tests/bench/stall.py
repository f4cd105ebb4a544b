"""`python -m tests.bench.stall`: how far a merge that runs delays the tokens of those who generate meanwhile.

A server with the example adapters streams to a few clients without end; in every second turn one merge after the other
runs on it. Printed: the gaps between tokens with and without, and their ratios.
"""

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.support.server_process import ServerProcess

ADAPTERS = Path("deploy/examples/adapters")
SHARES = (0.5, 0.9, 0.99)
PROMPT = "Write about the sea and the ships on it, and the harbour where they lie at night. " * 4
NEW_TOKENS = 128


@dataclass
class Clients:
    """Streams from `adapters`, one client each, until told to stop; the gaps between tokens in seconds."""

    url: str
    adapters: Sequence[str]
    gaps: list[float] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        threads = [threading.Thread(target=self._one, args=(name, end)) for name in self.adapters]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, adapter: str, end: float) -> None:
        parameters = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "adapter_id": adapter}
        body = {"inputs": PROMPT, "parameters": parameters}
        with httpx.Client(base_url=self.url, timeout=600) as client:
            while time.perf_counter() < end:
                with client.stream("POST", "/generate_stream", json=body) as answer:
                    times = [time.perf_counter() for line in answer.iter_lines() if line.startswith("data:")]
                self.gaps += [later - earlier for earlier, later in itertools.pairwise(times)]


class Merges:
    """One merge after the other, of all the adapters, while the context lasts."""

    def __init__(self, url: str, names: Sequence[str], first: int) -> None:
        self._url = url
        self._sources = [{"adapter": name} for name in names]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.number = first

    def __enter__(self) -> "Merges":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=600) as client:
            while not self._stop.is_set():
                self.number += 1
                told = {"rank": 16, "seed": self.number}
                name = f"merged-{self.number}"
                order = {"name": name, "method": "lego", "sources": self._sources, "parameters": told}
                client.post("/merge?wait=true", json=order).raise_for_status()


def quantiles(gaps: Sequence[float]) -> list[float]:
    cuts = statistics.quantiles(gaps, n=1000)
    return [cuts[int(1000 * share) - 1] for share in SHARES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6, help="with and without a merge, so many of each")
    parser.add_argument("--seconds", type=float, default=15, help="of a turn")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--serve", default="--quantize int8", help="more options of `polyrank serve`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        more = ("--preload", str(ADAPTERS), *options.serve.split())
        with ServerProcess("smollm2", Path(scratch) / "store", *more, log=Path(scratch) / "log") as server:
            names = sorted(path.name for path in ADAPTERS.iterdir())
            while "\npolyrank_compiling 1.0\n" in httpx.get(f"{server.url}/metrics").text:
                time.sleep(1)  # nothing to wait on but the figure
            Clients(server.url, names[: options.clients]).run(options.seconds)
            quiet, busy = (Clients(server.url, names[: options.clients]) for _ in range(2))
            merged = 0
            for turn in range(options.turns):
                quiet.run(options.seconds)
                with Merges(server.url, names, merged) as merges:
                    busy.run(options.seconds)
                merged = merges.number
                print(f"turn {turn + 1}: {merged} merges so far", flush=True)
    print(f"{merged} merges beside {len(busy.gaps)} tokens; {len(quiet.gaps)} tokens without")
    for share, without, with_ in zip(SHARES, quantiles(quiet.gaps), quantiles(busy.gaps), strict=True):
        print(f"p{100 * share:g}: {1000 * without:.1f} ms without, {1000 * with_:.1f} ms with, {with_ / without:.2f} x")


if __name__ == "__main__":
    main()

"""Throughput by the number of registered adapters, under traffic in which few adapters get most of the requests."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from server.load.arithmetic import Zipf
from tests.bench.adapters import SMALL, write_adapters
from tests.bench.session import Session
from tests.bench.traffic import Lane, compare

RANK = 2
AT_ONCE = 8


def zipf(session: Session) -> None:
    """Every count has a server of its own, all up together, so that they can be asked in turns."""
    counts = (5, 50, 200, 1000) if session.options.full else (5, 1000)
    everything = session.scratch / "zipf"
    folders = list(
        write_adapters(everything, session.base.model, max(counts), ranks=(RANK,), targets=SMALL, prefix="z")
    )
    with ExitStack() as stack:
        lanes = []
        for count in counts:
            server = session.server(
                f"{count} registered", preload=_first(folders, session.scratch / f"zipf-{count}", count)
            )
            lanes.append(Lane(stack.enter_context(server), partial(_draw, count), "z"))
        requests = 192 if session.options.full else 64
        compare(session, "zipf", f"Zipf(1), {AT_ONCE} at once", lanes, requests, AT_ONCE)
    for lane in lanes[1:]:
        session.ratio(f"Zipf(1): {lane.server.name} to {lanes[0].server.name}", lane.rates, lanes[0].rates)


def _draw(count: int, seed: int) -> Callable[[], int]:
    return Zipf(count, seed).draw


def _first(folders: list[Path], target: Path, count: int) -> Path:
    target.mkdir()
    for folder in folders[:count]:
        (target / folder.name).symlink_to(folder)
    return target

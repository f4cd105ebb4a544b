"""Twice as many adapters in use as the adapter memory holds, against a server that holds them all."""

import random
from collections.abc import Callable

from tests.bench.adapters import write_adapters
from tests.bench.session import Session
from tests.bench.traffic import Lane, compare

RANK = 16
KV_BYTES = 512 << 20  # what the KV cache is sure of by default


def working_set(session: Session) -> None:
    slots = 16 if session.options.full else 8
    at_once = slots // 2  # a batch never needs all the room there is
    folder = session.scratch / "working-set"
    names = [path.name for path in write_adapters(folder, session.base.model, 2 * slots, ranks=(RANK,), prefix="w")]

    def draw(seed: int) -> Callable[[], int]:
        chosen = random.Random(seed)
        return lambda: chosen.randrange(2 * slots)

    with session.server("all in memory", "--adapter-memory", "2GiB", preload=folder) as roomy:
        roomy.load(names)
        half = int(roomy.counters()["adapter_bytes_used"]) // 2
        less = ("--adapter-memory", str(half), "--device-memory", str(half + KV_BYTES))
        with session.server("half in memory", *less, preload=folder) as tight:
            lanes = [Lane(roomy, draw, "w"), Lane(tight, draw, "w")]
            case = f"{2 * slots} of rank {RANK}, {at_once} at once"
            compare(session, "working-set", case, lanes, 128 if session.options.full else 48, at_once)
    title = f"{2 * slots} adapters, room for {slots}"
    session.ratio(f"{title}: throughput to all in memory", lanes[1].rates, lanes[0].rates)
    session.ratio(
        f"{title}: time to first token to all in memory", lanes[1].first_tokens, lanes[0].first_tokens, lower=True
    )

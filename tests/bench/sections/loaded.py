"""Base requests on a server that has adapters in memory, against one that has none."""

from tests.bench.session import Session
from tests.bench.workload import BASE_8, DISTINCT_8


def loaded(session: Session) -> None:
    rates: dict[str, list[float]] = {"8 adapters in memory": [], "no adapters": []}
    with (
        session.server("8 adapters in memory", preload=session.adapters) as full,
        session.server("no adapters") as empty,
    ):
        full.run(DISTINCT_8.requests(0))
        empty.run(BASE_8.requests(0))
        for number in range(1, 2 * session.options.repeat + 1):
            for server in (full, empty):
                rates[server.name].append(server.run(BASE_8.requests(number)).rate)
    for name, found in rates.items():
        session.row("loaded", BASE_8.title, name, "tokens/s", found)
    session.ratio("base requests: adapters in memory to none", *rates.values())

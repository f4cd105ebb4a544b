"""Traffic over many adapters: servers asked in turns for the same draws of adapters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.load.arithmetic import percentile
from tests.bench import stats
from tests.bench.our_server import OurServer
from tests.bench.peers.protocol import Request, Run
from tests.bench.session import Session
from tests.bench.workload import SENTENCE

NEW_TOKENS = 32
Draw = Callable[[int], Callable[[], int]]  # by seed: what gives the number of the next request's adapter


@dataclass
class Lane:
    """One server with its own draw of adapters, and what came of it."""

    server: OurServer
    draw: Draw
    prefix: str
    runs: list[Run] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)

    def requests(self, count: int, seed: int, new_tokens: int) -> list[Request]:
        draw = self.draw(seed)
        return [Request(f"{seed} {index} {SENTENCE}", f"{self.prefix}{draw()}", new_tokens) for index in range(count)]

    def run(self, count: int, seed: int, at_once: int) -> None:
        before = self.server.counters()["adapter_loads_total"]
        self.runs.append(self.server.run(self.requests(count, seed, NEW_TOKENS), at_once))
        self.loads.append(self.server.counters()["adapter_loads_total"] - before)

    @property
    def rates(self) -> list[float]:
        return [run.rate for run in self.runs]

    @property
    def first_tokens(self) -> list[float]:
        """The median time to the first token of each run."""
        return [percentile(run.first, 0.5) for run in self.runs]


def compare(session: Session, section: str, case: str, lanes: Sequence[Lane], requests: int, at_once: int) -> None:
    """A warm run and rounds in turns; a row for each lane."""
    for lane in lanes:
        lane.server.run(lane.requests(2 * requests, 0, 1), at_once)
    for number in range(1, session.options.repeat + 2):
        for lane in lanes:
            lane.run(requests, number, at_once)
    for lane in lanes:
        first = [seconds for run in lane.runs for seconds in run.first]
        more = stats.milliseconds("first_token", first)
        loads = sum(lane.loads) / len(lane.loads)
        session.row(section, case, lane.server.name, "tokens/s", lane.rates, **more, loads_per_run=loads)

"""A store that has been counted, metrics with everything there is, and samples by name and labels."""

from prometheus_client.parser import text_string_to_metric_families

from adapters_store.census import Census
from adapters_store.histogram import NOTHING, Distribution
from server.access.key import KeyState
from server.engine.request import FinishReason, StepOutput
from server.engine.status import AdapterUse, EngineInfo, EngineStats, Figures
from server.metrics import Metrics
from server.replicas.state import LinkState
from tests.api.fake_replicas import FakeReplicas

INFO = EngineInfo("tiny", "f", "llama", "float32", "cpu", "none", 32, 64, 16, 4, 8, 16, 10, 1 << 20, 1 << 20, 1 << 21)

Key = tuple[str, tuple[tuple[str, str], ...]]


class Catalogue:
    """taken: how often it was counted."""

    def __init__(self, census: Census, fetches: Distribution = NOTHING) -> None:
        self.taken = 0
        self._census = census
        self._fetches = fetches

    def census(self) -> Census:
        self.taken += 1
        return self._census

    def fetch_seconds(self) -> Distribution:
        return self._fetches


def samples(metrics: Metrics) -> dict[Key, float]:
    """By name and sorted labels."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def everything() -> Metrics:
    """Of a server that has Redis, compressed adapters, a step of each kind, and one answer."""
    metrics = Metrics()
    steps = tuple((kind, with_, NOTHING) for kind in ("decode", "prefill") for with_ in (True, False))
    stats = EngineStats(
        figures=Figures(step_seconds=steps, load_seconds=(("read", NOTHING),)), expert_entropies=(("d", 0.5),)
    )
    metrics.watch_engine(INFO, lambda: stats)
    replicas = FakeReplicas()
    replicas.redis = LinkState(configured=True)
    metrics.watch_replicas(replicas)
    census = Census(disk=frozenset("d"), kinds={"lora": 1}, compressed={"int8": 1}, errors=(0.1,))
    metrics.watch_store(Catalogue(census), lambda: stats, list)
    metrics.watch_uses(lambda: {"d": AdapterUse(1, 1, 0.1)})
    metrics.watch_access(lambda: KeyState(1, stale=False), lambda: 0)
    metrics.http_answer("GET", "/health", 200, 0.1)
    metrics.rejected("overloaded")
    metrics.adapter_used("a", "d")
    timer = metrics.generation("generate", 1)
    timer.output(0, StepOutput(token_id=1))
    timer.output(0, StepOutput(token_id=1, finish_reason=FinishReason.LENGTH))
    return metrics

"""What the engine tells about itself: plain values for the API and the metrics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from adapters_store.histogram import NOTHING, Distribution


class Residency(StrEnum):
    """Where an adapter's weights are, seen from the engine."""

    ABSENT = "absent"  # in the store only, another machine's
    DISK = "disk"  # on this machine's disk; the engine itself does not tell it from absent
    HOST = "host"  # in host memory
    LOADING = "loading"
    RESIDENT = "resident"  # in the device pool


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts that do not change while the engine runs. Sizes in tokens unless named otherwise.

    aliases: other names that requests may call the model by.
    """

    model_id: str
    fingerprint: str
    architecture: str
    dtype: str
    device: str
    quantization: str
    vocabulary: int
    max_context: int
    max_batch_tokens: int
    max_running: int
    max_queued: int
    block_size: int
    kv_blocks: int
    adapter_memory_bytes: int
    host_adapter_memory_bytes: int
    device_memory_bytes: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The base model's tokenizer as its files describe it: class, special tokens and chat template.

    None where it has none; several templates count as none, as clients can read only one.
    """

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


@dataclass(slots=True)
class AdapterUse:
    """Of one adapter: tokens computed with it, and requests of it that began to run, with the seconds they waited."""

    tokens: int = 0
    waits: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """How times and sizes are spread since the start. Times in seconds.

    queue: until a request's first step begins; prefill: from there to its first token; decode: from there to its end.
    step: by kind (`decode`: one token for each request; `prefill`: any other) and whether any row has an adapter.
    load: by phase (read, pack, place). compared: decode steps with adapters for which the usual time of as many rows
    without any is known, and that time.
    """

    queue_seconds: Distribution = NOTHING
    prefill_seconds: Distribution = NOTHING
    decode_seconds: Distribution = NOTHING
    prompt_tokens: Distribution = NOTHING
    answer_tokens: Distribution = NOTHING
    adapters_per_step: Distribution = NOTHING
    step_seconds: tuple[tuple[str, bool, Distribution], ...] = ()
    load_seconds: tuple[tuple[str, Distribution], ...] = ()
    compared_seconds: float = 0.0
    compared_base_seconds: float = 0.0


NO_FIGURES = Figures()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of gauges and of counters since the start (names ending in `_total`)."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # share of KV blocks held by requests, 0 to 1
    kv_blocks_free: int = 0
    prefix_query_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    steps_total: int = 0
    preemptions_total: int = 0
    adapters_resident: int = 0
    adapter_bytes_used: int = 0
    adapter_hits_total: int = 0
    adapter_misses_total: int = 0
    adapter_loads_total: int = 0
    adapter_evictions_total: int = 0
    adapter_load_failures_total: int = 0
    adapters_host: int = 0  # in host memory
    host_bytes_used: int = 0
    host_hits_total: int = 0
    host_misses_total: int = 0
    host_evictions_total: int = 0
    kv_blocks_lent: int = 0  # to the adapters
    running_adapters: tuple[str, ...] = ()  # digests
    waiting_adapters: tuple[str, ...] = ()
    up: bool = True  # false once the engine's thread has ended or is stuck
    seconds_since_step: float = 0.0  # or since a command was carried out; 0 while idle
    gated_adapters_resident: int = 0  # adapters whose tokens choose their ranks
    expert_entropies: tuple[tuple[str, float], ...] = ()  # of some of them, by digest: how evenly, 0 to 1
    merged_into_base: int = 0  # adapters in the base's own weights, at most one
    compiling: bool = False  # the layers, in the background
    layers_compiled: bool = False
    oldest_waiting_seconds: float = 0.0  # since the request that has been in the queue for longest came
    figures: Figures = NO_FIGURES


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One module's ranks: how often each was chosen since the adapter became resident; a token uses `active`."""

    active: int
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.counts) // self.active

    @property
    def shares(self) -> list[float]:
        """Of all choices; zeros before the first."""
        total = sum(self.counts)
        return [count / total if total else 0.0 for count in self.counts]

    @property
    def entropy(self) -> float | None:
        """Of the shares, over that of equal ones: 1 where all ranks are used alike. None before the first token.

        A token uses `active` different ranks, so a router that chooses the same ones for every token has
        `log(active) / log(rank)`.
        """
        if not self.tokens:
            return None
        if len(self.counts) == 1:
            return 1.0
        return -sum(share * math.log(share) for share in self.shares if share) / math.log(len(self.counts))

    @property
    def unused(self) -> int:
        """Ranks that no token chose."""
        return self.counts.count(0)


def mean_entropy(loads: Mapping[str, ExpertLoad]) -> float | None:
    """Over the modules that have seen tokens; None if none has."""
    found = [entropy for load in loads.values() if (entropy := load.entropy) is not None]
    return sum(found) / len(found) if found else None

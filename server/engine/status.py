"""What the engine tells about itself: plain values for the API and the metrics."""

from dataclasses import dataclass
from enum import StrEnum


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
    adapter_load_seconds_total: tuple[tuple[str, float], ...] = ()  # by phase: read, pack, place
    adapters_host: int = 0  # in host memory
    host_bytes_used: int = 0
    host_hits_total: int = 0
    host_misses_total: int = 0
    host_evictions_total: int = 0
    kv_blocks_lent: int = 0  # to the adapters
    running_adapters: tuple[str, ...] = ()  # digests
    waiting_adapters: tuple[str, ...] = ()
    seconds_since_step: float = 0.0  # 0 while idle
    compiling: bool = False  # the layers, in the background
    layers_compiled: bool = False

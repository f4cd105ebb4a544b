"""Every metric of the service: name, type, labels and meaning, in this one place."""

from dataclasses import dataclass
from typing import Literal

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Name:
    """One metric. name: without the `_total`, `_bucket`, `_sum` and `_count` that its samples end in."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()


def _counter(name: str, text: str, *labels: str) -> Name:
    return Name(f"polyrank_{name}", "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Name:
    return Name(f"polyrank_{name}", "gauge", text, labels)


def _histogram(name: str, text: str, *labels: str) -> Name:
    return Name(f"polyrank_{name}", "histogram", text, labels)


HTTP_REQUESTS = _counter("http_requests", "HTTP answers; 499 where the client left.", "method", "route", "status")
HTTP_SECONDS = _histogram("http_request_seconds", "Time to the end of the answer.", "route")
REJECTIONS = _counter("rejections", "Refused and failed requests by the error's code.", "code")
REQUESTS = _counter("generation_requests", "Requests given to the engine.", "endpoint")
FINISHED = _counter("generations_finished", "Answers by finish reason.", "endpoint", "reason")
FIRST_TOKEN = _histogram("time_to_first_token_seconds", "From submit to first token.", "endpoint")
INTER_TOKEN = _histogram("inter_token_seconds", "Between tokens of one answer.", "endpoint")
WHOLE = _histogram("generation_seconds", "From submit to the last token.", "endpoint")
LOOP_LAG = _histogram("event_loop_lag_seconds", "How late the event loop ran a callback; asked once a second.")
PER_REQUEST = (HTTP_REQUESTS, HTTP_SECONDS, REJECTIONS, REQUESTS, FINISHED, FIRST_TOKEN, INTER_TOKEN, WHOLE, LOOP_LAG)

ADAPTER_REQUESTS = _counter("adapter_requests", "Requests that name the adapter.", "adapter")
ADAPTER_TOKENS = _counter("adapter_tokens", "Tokens computed with the adapter, prompts included.", "adapter")
ADAPTER_WAITS = _counter("adapter_waits", "Requests of the adapter that began to run.", "adapter")
ADAPTER_WAIT_SECONDS = _counter("adapter_wait_seconds", "Time these were in the queue, its load included.", "adapter")
PER_ADAPTER = (ADAPTER_REQUESTS, ADAPTER_TOKENS, ADAPTER_WAITS, ADAPTER_WAIT_SECONDS)

ENGINE_GAUGES = {  # field of EngineStats -> its metric
    "running": _gauge("running", "Requests in the batch."),
    "waiting": _gauge("waiting", "Requests in the queue."),
    "oldest_waiting_seconds": _gauge(
        "oldest_waiting_seconds", "Age of the oldest request in the queue; 0 without one."
    ),
    "merged_into_base": _gauge("merged_into_base", "Adapters in the base's own weights: 1 while nothing else runs."),
    "kv_usage": _gauge("kv_usage", "Share of KV blocks held by requests, 0 to 1."),
    "kv_blocks_free": _gauge("kv_blocks_free", "KV blocks that no request holds."),
    "adapters_resident": _gauge("adapters_resident", "Adapters in device memory."),
    "adapter_bytes_used": _gauge("adapter_bytes_used", "Bytes of device memory held by adapters."),
    "gated_adapters_resident": _gauge(
        "gated_adapters_resident", "Adapters in device memory whose tokens choose their ranks."
    ),
    "kv_blocks_lent": _gauge("kv_blocks_lent", "KV blocks lent to the adapters."),
    "adapters_host": _gauge("adapters_host", "Adapters in host memory, also those in device memory too."),
    "host_bytes_used": _gauge("host_bytes_used", "Bytes of host memory held by adapters."),
    "up": _gauge("engine_up", "1 while the engine gets on; 0 once its thread has ended or is stuck: `/health` fails."),
    "seconds_since_step": _gauge("seconds_since_step", "Seconds since the engine's last step; 0 while idle."),
    "compiling": _gauge("compiling", "1 while the model's layers are compiled in the background."),
    "layers_compiled": _gauge("layers_compiled", "1 from when the model's layers run compiled."),
}
ENGINE_COUNTERS = {  # field of EngineStats, less `_total` -> its metric
    "prefix_query_tokens": _counter("prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": _counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "prompt_tokens": _counter("prompt_tokens", "Prompt tokens taken in."),
    "generated_tokens": _counter("generated_tokens", "Tokens generated."),
    "steps": _counter("steps", "Steps of the engine."),
    "preemptions": _counter("preemptions", "Requests put back into the queue: no KV blocks, or another's turn."),
    "adapter_hits": _counter("adapter_hits", "Requests that found their adapter in device memory."),
    "adapter_misses": _counter("adapter_misses", "Requests that had to wait for their adapter."),
    "adapter_loads": _counter("adapter_loads", "Adapters loaded into device memory."),
    "adapter_evictions": _counter("adapter_evictions", "Adapters evicted from device memory."),
    "adapter_load_failures": _counter("adapter_load_failures", "Adapters that could not be loaded."),
    "host_hits": _counter("host_hits", "Loads that found their adapter in host memory."),
    "host_misses": _counter("host_misses", "Loads that had to read their adapter from disk or store."),
    "host_evictions": _counter("host_evictions", "Adapters evicted from host memory."),
}
FIGURES = {  # field of Figures -> its metric
    "queue_seconds": _histogram("queue_seconds", "From a request's arrival to its first step."),
    "prefill_seconds": _histogram("prefill_seconds", "From a request's first step to its first token."),
    "decode_seconds": _histogram("decode_seconds", "From a request's first token to its end."),
    "prompt_tokens": _histogram("request_prompt_tokens", "Tokens of the prompt of an answered request."),
    "answer_tokens": _histogram("request_answer_tokens", "Tokens of an answer."),
    "adapters_per_step": _histogram("step_adapters", "Distinct adapters in a step."),
}
STEP_SECONDS = _histogram(
    "step_seconds", "A step: `decode` is one token per request; `adapters` is yes or no.", "kind", "adapters"
)
LOAD_SECONDS = _histogram(
    "adapter_load_seconds", "A load's phases: fetch from a bucket (a part of read), read, pack, place.", "phase"
)
COMPARED_SECONDS = _counter(
    "compared_step_seconds",
    "`with`: decode steps with adapters; `without`: the usual time of steps of as many rows without any.",
    "adapters",
)
EXPERT_ENTROPY = _gauge(
    "expert_load_entropy",
    "How evenly the gated adapters used last use their ranks: 1 for all alike. The mean of their modules.",
    "adapter",
)
ENGINE_INFO = _gauge("engine_info", "The base model and how it runs.", "model", "fingerprint", "dtype", "device")
ENGINE = (
    *ENGINE_GAUGES.values(),
    *ENGINE_COUNTERS.values(),
    *FIGURES.values(),
    STEP_SECONDS,
    LOAD_SECONDS,
    COMPARED_SECONDS,
    EXPERT_ENTROPY,
    ENGINE_INFO,
)

TIERS = _gauge("adapters", "Adapters with a name, by the nearest place: device, host, disk, absent.", "tier")
KINDS = _gauge("adapter_kinds", "Adapters with a name by what they were uploaded as.", "kind")
COMPRESSED = _gauge("compressed_adapters", "Adapters that were compressed here, by dtype or method.", "dtype")
COMPRESSED_BYTES = _gauge("compressed_bytes", "Bytes of the files of compressed adapters.")
ORIGINAL_BYTES = _gauge("compressed_original_bytes", "Bytes of the files that these were made of.")
COMPRESSION_ERROR = _gauge("compression_error", "Mean relative error of the weights of compressed adapters, 0 to 1.")
WORST_COMPRESSION_ERROR = _gauge("compression_error_worst", "The largest such error.")
JOBS = _gauge("jobs", "Jobs that merge or generate adapters.", "kind", "state")
STORE = (
    TIERS,
    KINDS,
    COMPRESSED,
    COMPRESSED_BYTES,
    ORIGINAL_BYTES,
    COMPRESSION_ERROR,
    WORST_COMPRESSION_ERROR,
    JOBS,
)
JOB_KINDS = ("merge", "generate")
JOB_STATES = ("queued", "running", "done", "failed", "cancelled")

STORE_CHECKS = _counter("store_checks", "Names compared with the store before their use.")
STORE_CHECK_FAILURES = _counter("store_check_failures", "Names that the store did not answer for in time.")
REDIS_UP = _gauge("redis_up", "1 while Redis answers; only where it is configured, as are the next ones.")
REDIS_CALLS = _counter("redis_calls", "Calls to Redis.")
REDIS_FAILURES = _counter("redis_failures", "Calls to Redis without a right answer.")
BREAKER_OPENINGS = _counter("redis_breaker_openings", "Times that Redis was left alone for a second after a failure.")
REPLICAS = _gauge("replicas", "Servers alive, this one included.")
REPLICA_CHANGES = _counter("replica_changes", "Changes by other servers, heard through Redis.")
REPLICA_LAG = _gauge("replica_lag_seconds", "Age of the last notice when it was read.")
NOTICES_WAITING = _gauge("replica_notices_waiting", "Own changes not told yet.")
SHARED = (
    STORE_CHECKS,
    STORE_CHECK_FAILURES,
    REDIS_UP,
    REDIS_CALLS,
    REDIS_FAILURES,
    BREAKER_OPENINGS,
    REPLICAS,
    REPLICA_CHANGES,
    REPLICA_LAG,
    NOTICES_WAITING,
)

API_KEYS = _gauge("api_keys", "API keys that are valid now; only where there are any (`--api-keys`).")
API_KEYS_STALE = _gauge("api_keys_stale", "1 while they cannot be read, so that those read before go on.")
AUDIT_FAILURES = _counter("audit_failures", "Lines that the record of changes (`--audit-log`) could not take.")
ACCESS = (API_KEYS, API_KEYS_STALE, AUDIT_FAILURES)


def _vllm(name: str, kind: Kind, text: str, *labels: str) -> Name:
    return Name(f"vllm:{name}", kind, text, labels or ("model_name",))


VLLM_GAUGES = {  # field of EngineStats -> its name in vLLM
    "running": _vllm("num_requests_running", "gauge", "Requests in the batch."),
    "waiting": _vllm("num_requests_waiting", "gauge", "Requests in the queue."),
    "kv_usage": _vllm("kv_cache_usage_perc", "gauge", "Share of KV blocks in use, 0 to 1."),
}
VLLM_COUNTERS = {  # the same, less `_total`
    "prompt_tokens": _vllm("prompt_tokens", "counter", "Prompt tokens taken in."),
    "generated_tokens": _vllm("generation_tokens", "counter", "Tokens generated."),
    "preemptions": _vllm("num_preemptions", "counter", "Requests put back into the queue."),
    "prefix_query_tokens": _vllm("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": _vllm("prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache."),
}
VLLM_FIGURES = {  # field of Figures
    "queue_seconds": _vllm("request_queue_time_seconds", "histogram", "Time in the queue."),
    "prefill_seconds": _vllm(
        "request_prefill_time_seconds", "histogram", "Time to the first token from the first step."
    ),
    "decode_seconds": _vllm("request_decode_time_seconds", "histogram", "Time from the first token to the end."),
    "prompt_tokens": _vllm("request_prompt_tokens", "histogram", "Tokens of a prompt."),
    "answer_tokens": _vllm("request_generation_tokens", "histogram", "Tokens of an answer."),
}
VLLM_TIMES = {  # our histogram by endpoint -> its name in vLLM, over all endpoints
    FIRST_TOKEN: _vllm("time_to_first_token_seconds", "histogram", "From submit to first token."),
    INTER_TOKEN: _vllm("inter_token_latency_seconds", "histogram", "Between tokens of one answer."),
    WHOLE: _vllm("e2e_request_latency_seconds", "histogram", "From submit to the last token."),
}
VLLM_SUCCESS = _vllm("request_success", "counter", "Answers by finish reason.", "model_name", "finished_reason")
VLLM_CACHE = _vllm("cache_config_info", "gauge", "The KV cache.", "block_size", "num_gpu_blocks")
VLLM_LORA = _vllm(
    "lora_requests_info",
    "gauge",
    "Adapters running and waiting now; the value is the time, as the Gateway API reads it.",
    "max_lora",
    "running_lora_adapters",
    "waiting_lora_adapters",
)
VLLM = (
    *VLLM_GAUGES.values(),
    *VLLM_COUNTERS.values(),
    *VLLM_FIGURES.values(),
    *VLLM_TIMES.values(),
    VLLM_SUCCESS,
    VLLM_CACHE,
    VLLM_LORA,
)

GROUPS = {  # title -> its metrics
    "Requests": PER_REQUEST,
    "Adapters by name": PER_ADAPTER,
    "Engine": ENGINE,
    "Store and jobs": STORE,
    "Servers over one store": SHARED,
    "Keys and the record of changes": ACCESS,
    "Under vLLM's names": VLLM,
}

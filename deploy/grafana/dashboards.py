"""The three dashboards. Written anew to `dashboards/` by `python -m deploy.grafana.dashboards`."""

import json
from pathlib import Path

from deploy.grafana.panels import (
    Dashboard,
    Panel,
    Query,
    mean,
    quantiles,
    rate,
    render,
    share,
    stat,
    total,
    worst,
)

FOLDER = Path(__file__).parent / "dashboards"

_NOW = [
    stat("Running", "Requests in the batch", total("polyrank_running")),
    stat("Waiting", "Requests in the queue", total("polyrank_waiting")),
    stat("Oldest in the queue", "Its age", worst("polyrank_oldest_waiting_seconds"), "s"),
    stat("KV cache in use", "Of the server with the fullest", worst("polyrank_kv_usage"), "percentunit"),
    stat("Adapters on the device", "All servers together", total("polyrank_adapters_resident")),
    stat("Since the last step", "0 while idle; a server with work steps", worst("polyrank_seconds_since_step"), "s"),
]

OVERVIEW = Dashboard(
    "polyrank-overview",
    "Polyrank",
    [
        *_NOW,
        Panel(
            "Requests by endpoint",
            "Given to the engine",
            [Query(rate("polyrank_generation_requests_total", "endpoint"), "{{endpoint}}")],
            "reqps",
        ),
        Panel(
            "Tokens",
            "In a second",
            [
                Query(rate("polyrank_prompt_tokens_total"), "prompts"),
                Query(rate("polyrank_generated_tokens_total"), "generated"),
            ],
        ),
        Panel(
            "Running and waiting",
            "Requests",
            [Query(total("polyrank_running"), "running"), Query(total("polyrank_waiting"), "waiting")],
        ),
        Panel("Time to the first token", "From submit", quantiles("polyrank_time_to_first_token_seconds"), "s"),
        Panel("Time between tokens", "Of one answer", quantiles("polyrank_inter_token_seconds"), "s"),
        Panel("Time to the whole answer", "From submit", quantiles("polyrank_generation_seconds"), "s"),
        Panel("Time in the queue", "Until the first step", quantiles("polyrank_queue_seconds"), "s"),
        Panel("Prefill", "From the first step to the first token", quantiles("polyrank_prefill_seconds"), "s"),
        Panel("Decode", "From the first token to the end", quantiles("polyrank_decode_seconds"), "s"),
        Panel("Prompts", "Tokens of one", quantiles("polyrank_request_prompt_tokens", 0.5, 0.95)),
        Panel("Answers", "Tokens of one", quantiles("polyrank_request_answer_tokens", 0.5, 0.95)),
        Panel(
            "A step",
            "decode: one token for each request",
            [Query(mean("polyrank_step_seconds", "kind"), "{{kind}}")],
            "s",
        ),
        Panel("Event loop", "How late it runs what is due", quantiles("polyrank_event_loop_lag_seconds"), "s"),
        Panel(
            "KV cache",
            "Share of the blocks that requests hold",
            [Query('vllm:kv_cache_usage_perc{instance=~"$instance"}', "{{instance}}")],
            "percentunit",
        ),
        Panel("Preemptions", "Requests put back for want of KV blocks", [Query(rate("polyrank_preemptions_total"))]),
        Panel(
            "Prompt tokens found in the prefix cache",
            "Share of those looked up",
            [Query(f"{rate('polyrank_prefix_hit_tokens_total')} / {rate('polyrank_prefix_query_tokens_total')}")],
            "percentunit",
        ),
        Panel(
            "Answers by end",
            "Finish reasons",
            [Query(rate("polyrank_generations_finished_total", "reason"), "{{reason}}")],
            "reqps",
        ),
        Panel(
            "Refusals by code",
            "Errors of requests, refused or failed",
            [Query(rate("polyrank_rejections_total", "code"), "{{code}}")],
            "reqps",
        ),
        Panel(
            "HTTP answers by status",
            "499: the client left",
            [Query(rate("polyrank_http_requests_total", "status"), "{{status}}")],
            "reqps",
        ),
    ],
)

_HITS, _MISSES = rate("polyrank_adapter_hits_total"), rate("polyrank_adapter_misses_total")
_HOST_HITS, _HOST_MISSES = rate("polyrank_host_hits_total"), rate("polyrank_host_misses_total")
_WITH = rate("polyrank_compared_step_seconds_total", labels='adapters="with"')
_WITHOUT = rate("polyrank_compared_step_seconds_total", labels='adapters="without"')

ADAPTERS = Dashboard(
    "polyrank-adapters",
    "Polyrank: adapters",
    [
        stat("On the device", "Adapters", total("polyrank_adapters", labels='tier="device"')),
        stat("In host memory", "Not on the device", total("polyrank_adapters", labels='tier="host"')),
        stat("On disk", "In no memory", total("polyrank_adapters", labels='tier="disk"')),
        stat("In the bucket only", "On no disk of the server", total("polyrank_adapters", labels='tier="absent"')),
        stat("Adapter memory", "Device, all servers", total("polyrank_adapter_bytes_used"), "bytes"),
        stat("Oldest in the queue", "Its age", worst("polyrank_oldest_waiting_seconds"), "s"),
        Panel(
            "Adapters by tier",
            "The nearest place of each",
            [Query(total("polyrank_adapters", "tier"), "{{tier}}")],
            stacked=True,
        ),
        Panel(
            "Found where it was looked for",
            "device: of requests; host: of loads",
            [Query(share(_HITS, _MISSES), "device"), Query(share(_HOST_HITS, _HOST_MISSES), "host")],
            "percentunit",
        ),
        Panel(
            "Loads and evictions",
            "In a second",
            [
                Query(rate("polyrank_adapter_loads_total"), "loads"),
                Query(rate("polyrank_adapter_evictions_total"), "evicted from the device"),
                Query(rate("polyrank_host_evictions_total"), "evicted from host memory"),
                Query(rate("polyrank_adapter_load_failures_total"), "failed"),
            ],
        ),
        Panel(
            "A load, by phase",
            "Mean; fetch is a part of read",
            [Query(mean("polyrank_adapter_load_seconds", "phase"), "{{phase}}")],
            "s",
        ),
        Panel(
            "Reading an adapter",
            "Fetched where need be, verified",
            [
                Query(
                    f"histogram_quantile({q}, "
                    + rate("polyrank_adapter_load_seconds_bucket", "le", 'phase="read"')
                    + ")",
                    f"p{q * 100:g}",
                )
                for q in (0.5, 0.99)
            ],
            "s",
        ),
        Panel(
            "Distinct adapters in a step",
            "Steps without any count too",
            [
                Query(mean("polyrank_step_adapters"), "mean"),
                *quantiles("polyrank_step_adapters", 0.95),
            ],
        ),
        Panel(
            "Busiest adapters, tokens",
            "Computed in a second, prompts included; `other` stands for all that are not among the busiest",
            [Query(f"topk(10, {rate('polyrank_adapter_tokens_total', 'adapter')})", "{{adapter}}")],
            stacked=True,
        ),
        Panel(
            "Busiest adapters, requests",
            "In a second",
            [Query(f"topk(10, {rate('polyrank_adapter_requests_total', 'adapter')})", "{{adapter}}")],
            "reqps",
        ),
        Panel(
            "Longest waits by adapter",
            "Mean time in the queue, with the load",
            [
                Query(
                    f"topk(10, {rate('polyrank_adapter_wait_seconds_total', 'adapter')} / "
                    f"({rate('polyrank_adapter_waits_total', 'adapter')} > 0))",
                    "{{adapter}}",
                )
            ],
            "s",
        ),
        Panel(
            "What adapters take of a decode step",
            "Against the usual time of steps of as many rows without any",
            [Query(f"clamp_min(1 - {_WITHOUT} / {_WITH}, 0)", "share")],
            "percentunit",
        ),
        Panel(
            "Decode steps with and without adapters",
            "Mean, whatever their rows",
            [Query(mean("polyrank_step_seconds", "adapters", 'kind="decode"'), "adapters: {{adapters}}")],
            "s",
        ),
        Panel(
            "Memory of adapters",
            "Device and host",
            [
                Query(total("polyrank_adapter_bytes_used"), "device"),
                Query(total("polyrank_host_bytes_used"), "host"),
            ],
            "bytes",
        ),
        Panel(
            "KV blocks lent to adapters",
            "Given back when requests need them",
            [Query(total("polyrank_kv_blocks_lent"))],
        ),
        Panel(
            "Age of the oldest in the queue",
            "Starvation shows here",
            [Query(worst("polyrank_oldest_waiting_seconds"))],
            "s",
        ),
    ],
)

STORE = Dashboard(
    "polyrank-store",
    "Polyrank: store and jobs",
    [
        stat(
            "Adapters",
            "With a name, on all tiers, of one server",
            'max (sum by (instance) (polyrank_adapters{instance=~"$instance"}))',
        ),
        stat("Servers", "Over one store, as Redis knows them", worst("polyrank_replicas")),
        stat("Redis", "1: every server reaches it", 'min (polyrank_redis_up{instance=~"$instance"})'),
        stat("Jobs running", "Merging and generating", total("polyrank_jobs", labels='state="running"')),
        stat(
            "Compressed to",
            "Bytes of the compressed, of those of their originals",
            f"{worst('polyrank_compressed_bytes')} / {worst('polyrank_compressed_original_bytes')}",
            "percentunit",
        ),
        stat(
            "Worst compression",
            "Relative error of the weights",
            worst("polyrank_compression_error_worst"),
            "percentunit",
        ),
        Panel(
            "Adapters by kind",
            "As uploaded",
            [Query('max by (kind) (polyrank_adapter_kinds{instance=~"$instance"})', "{{kind}}")],
            stacked=True,
        ),
        Panel(
            "Compressed adapters",
            "By dtype or method",
            [Query('max by (dtype) (polyrank_compressed_adapters{instance=~"$instance"})', "{{dtype}}")],
            stacked=True,
        ),
        Panel(
            "Compression error",
            "Relative, of the weights",
            [
                Query(worst("polyrank_compression_error"), "mean"),
                Query(worst("polyrank_compression_error_worst"), "worst"),
            ],
            "percentunit",
        ),
        Panel(
            "Jobs by state",
            "Merging and generating",
            [Query(total("polyrank_jobs", "kind, state"), "{{kind}} {{state}}")],
        ),
        Panel(
            "Downloads from the bucket",
            "In a second; none from a folder",
            [Query(rate("polyrank_adapter_load_seconds_count", labels='phase="fetch"'))],
        ),
        Panel(
            "Names compared with the store",
            "In a second; a failure is an answer that did not come in time",
            [
                Query(rate("polyrank_store_checks_total"), "compared"),
                Query(rate("polyrank_store_check_failures_total"), "failed"),
            ],
        ),
        Panel(
            "Calls to Redis",
            "In a second",
            [
                Query(rate("polyrank_redis_calls_total"), "all"),
                Query(rate("polyrank_redis_failures_total"), "failed"),
                Query(rate("polyrank_redis_breaker_openings_total"), "given up for a second"),
            ],
        ),
        Panel(
            "Changes between servers",
            "Heard in a second, and own ones not told yet",
            [
                Query(rate("polyrank_replica_changes_total"), "heard"),
                Query(total("polyrank_replica_notices_waiting"), "waiting"),
            ],
        ),
        Panel(
            "Lag of changes",
            "Age of the last notice when it was read",
            [Query(worst("polyrank_replica_lag_seconds"))],
            "s",
        ),
        Panel(
            "Refused and failed by code",
            "Uploads, merges and generations",
            [Query(rate("polyrank_rejections_total", "code"), "{{code}}")],
            "reqps",
        ),
        Panel(
            "Routes, 95 % of answers within",
            "Changes of adapters among them",
            [
                Query(
                    f"histogram_quantile(0.95, {rate('polyrank_http_request_seconds_bucket', 'le, route')})",
                    "{{route}}",
                )
            ],
            "s",
        ),
    ],
)

DASHBOARDS = {"overview.json": OVERVIEW, "adapters.json": ADAPTERS, "store.json": STORE}


def text(dashboard: Dashboard) -> str:
    return json.dumps(render(dashboard), indent=1) + "\n"


def main() -> None:
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / name).write_text(text(dashboard))


if __name__ == "__main__":
    main()

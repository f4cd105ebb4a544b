"""Sequences and pools of handy sizes for tests of the scheduler. Nothing here imports torch."""

from collections.abc import Iterable
from collections.abc import Sequence as TokenSequence

from server.engine.adapter_pool import AdapterPool, Placement
from server.engine.batch import ScheduledBatch
from server.engine.block_pool import BlockPool
from server.engine.page_allocator import PageAllocator
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence

BLOCK = 4  # tokens
PAGE = 64  # bytes, so that a block of PAGE bytes fills a page


def weighted(adapters: Iterable[str | tuple[str, float]]) -> tuple[WeightedAdapter, ...]:
    return tuple(WeightedAdapter(a) if isinstance(a, str) else WeightedAdapter(*a) for a in adapters)


def make_sequence(
    request_id: str,
    prompt: TokenSequence[int],
    *,
    adapters: Iterable[str | tuple[str, float]] = (),
    max_tokens: int = 4,
    tenant: str = "tenant",
    sampling: SamplingParams | None = None,
    block_size: int = BLOCK,
) -> Sequence:
    """A sequence over token ids; adapters by digest, or as (digest, weight)."""
    request = GenerationRequest(
        request_id, tuple(prompt), sampling or SamplingParams(), weighted(adapters), tenant=tenant
    )
    return Sequence(request, prompt, max_tokens, "base", block_size)


def prompt(length: int, salt: int = 0) -> list[int]:
    """Token ids that differ from those of every other salt."""
    return [1_000 * (salt + 1) + position for position in range(length)]


def make_scheduler(
    *, blocks: int = 16, pages: int = 8, slots: int = 8, budget: int = 16, max_running: int = 8, between: int = 0
) -> Scheduler:
    """blocks and pages: what KV cache and adapters are sure of; between: further ones, for whichever needs them."""
    kv = BlockPool(blocks + between, BLOCK, blocks)
    adapters = AdapterPool(PageAllocator(pages, PAGE, blocks + between), slots, kv)
    return Scheduler(kv, adapters, token_budget=budget, max_running=max_running)


def add(scheduler: Scheduler, request_id: str, length: int, **options: object) -> Sequence:
    """A waiting sequence with a prompt of its own, unless `tokens` gives one."""
    salt = len(scheduler.waiting) + len(scheduler.running)
    tokens = options.pop("tokens", None) or prompt(length, salt)
    sequence = make_sequence(request_id, tokens, **options)  # type: ignore[arg-type]
    scheduler.add(sequence)
    return sequence


def load(pool: AdapterPool, digest: str, pages: int = 1) -> Placement | None:
    """Bring an adapter of that many pages in, the regular way."""
    pool.want(digest)
    if digest in pool.take_wanted(1, urgent={digest}):
        return pool.place(digest, [PAGE] * pages)
    raise AssertionError(f"{digest} was asked for already")


def step(scheduler: Scheduler, token: int = 7) -> ScheduledBatch:
    """One step of an engine whose model always says `token`; sequences leave at `max_tokens`."""
    batch = scheduler.schedule()
    check_batch(scheduler, batch)
    for entry in batch.entries:
        samples = entry.samples
        scheduler.computed(entry)
        if samples:
            entry.sequence.tokens.append(token)
        if entry.sequence.num_output >= entry.sequence.max_tokens:
            scheduler.remove(entry.sequence)
    scheduler.check_integrity()
    return batch


def run(scheduler: Scheduler, at_most: int = 200) -> list[ScheduledBatch]:
    """Steps until nothing is left; fails if that takes more than `at_most`."""
    batches = []
    while scheduler.running or scheduler.waiting:
        batches.append(step(scheduler))
        assert len(batches) <= at_most, "the scheduler does not come to an end"
    return batches


def check_batch(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    """What holds of every batch."""
    assert sum(entry.count for entry in batch.entries) <= scheduler.token_budget
    assert len(scheduler.running) <= scheduler.max_running
    ids = [entry.sequence.request_id for entry in batch.entries]
    assert len(set(ids)) == len(ids), "a sequence stands in the batch twice"
    for entry in batch.entries:
        assert entry.sequence in scheduler.running
        assert entry.count >= 1
        assert entry.start == entry.sequence.num_computed
        assert entry.start + entry.count <= len(entry.sequence.tokens)
        assert len(entry.sequence.block_table) * scheduler.blocks.block_size >= entry.start + entry.count
    if scheduler.running:
        assert batch.entries, "sequences run and none gets on"


def plan(batch: ScheduledBatch) -> list[tuple[str, int, int]]:
    """The batch as (request id, first position, tokens)."""
    return [(entry.sequence.request_id, entry.start, entry.count) for entry in batch.entries]

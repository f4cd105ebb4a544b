"""Drives a prepared tiny model as the engine does: flat batches, random chunks, scattered pages, mixed adapters."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kernels.segments import Segments
from server.model.base import BaseModel
from server.model.kv_cache import KVCache
from server.model.loader import describe
from server.model.prepare import forward, prepare_model
from server.model.step_context import AdapterTable, AttentionMetadata, StepContext
from tests.support.models import tiny_model, tiny_tokenizer

PAGE = 4
PAGES = 64


@dataclass
class Request:
    """Tokens of one request and the slot of its adapter (None: base)."""

    tokens: list[int]
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    done: int = 0


def prepared(architecture: str, seed: int = 0) -> tuple[BaseModel, StepContext]:
    """A prepared tiny model with an empty cache."""
    base = describe(tiny_model(architecture, seed), tiny_tokenizer(), f"tiny/{architecture}")
    context = prepare_model(base)
    attach_cache(base, context)
    return base, context


def attach_cache(base: BaseModel, context: StepContext) -> None:
    context.cache = KVCache(PAGES, base.num_layers, base.num_kv_heads, base.head_dim, dtype=base.dtype, page_size=PAGE)
    context.cache.buffer.fill_(float("nan"))  # a key that nobody wrote must never be read
    context.table = context.table or AdapterTable(context.module_names, slots=4)


def random_requests(
    lengths: Sequence[int], vocabulary: int, seed: int, slots: Sequence[int | None] = ()
) -> list[Request]:
    """Requests of random tokens whose pages are drawn in random order from one pool."""
    source = random.Random(seed)
    free = list(range(PAGES))
    source.shuffle(free)
    requests = []
    for index, length in enumerate(lengths):
        tokens = [source.randrange(vocabulary) for _ in range(length)]
        pages = [free.pop() for _ in range(-(-length // PAGE))]
        requests.append(Request(tokens, slots[index] if slots else None, pages))
    return requests


def run(
    base: BaseModel, context: StepContext, requests: list[Request], seed: int, *, largest: int = 9
) -> list[torch.Tensor]:
    """All logits of each request, [tokens, vocabulary], computed in steps of random chunks and random order."""
    source = random.Random(seed)
    logits: list[list[torch.Tensor]] = [[] for _ in requests]
    while pending := [index for index, request in enumerate(requests) if request.done < len(request.tokens)]:
        chosen = source.sample(pending, source.randint(1, len(pending)))
        counts = [min(source.randint(1, largest), len(requests[i].tokens) - requests[i].done) for i in chosen]
        out = step(base, context, [requests[i] for i in chosen], counts)
        for index, part in zip(chosen, torch.split(out, counts), strict=True):
            logits[index].append(part)
    return [torch.cat(parts) for parts in logits]


def step(
    base: BaseModel,
    context: StepContext,
    requests: list[Request],
    counts: list[int],
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """One forward of the next `counts` tokens; logits of the rows `kept` (default: all)."""
    begin_step(context, requests, counts, kept)
    ranges = [range(request.done, request.done + count) for request, count in zip(requests, counts, strict=True)]
    tokens = torch.tensor([request.tokens[p] for request, r in zip(requests, ranges, strict=True) for p in r])
    positions = torch.tensor([p for r in ranges for p in r])
    for request, count in zip(requests, counts, strict=True):
        request.done += count
    return forward(base, context, tokens, positions, torch.arange(sum(counts)) if kept is None else kept)


def begin_step(context: StepContext, requests: list[Request], counts: list[int], kept: torch.Tensor | None) -> None:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    table = torch.full((len(requests), max(len(request.pages) for request in requests)), -1, dtype=torch.int32)
    for row, request in enumerate(requests):
        table[row, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
    slots = [
        request.pages[position // PAGE] * PAGE + position % PAGE
        for request, count in zip(requests, counts, strict=True)
        for position in range(request.done, request.done + count)
    ]
    lengths = [request.done + count for request, count in zip(requests, counts, strict=True)]
    rows = [request.slot for request, count in zip(requests, counts, strict=True) for _ in range(count)]
    kept_rows = rows if kept is None else [rows[row] for row in kept.tolist()]
    context.begin(
        AttentionMetadata(
            query_start=torch.tensor(starts, dtype=torch.int32),
            kv_length=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            slots=torch.tensor(slots),
        ),
        segments(rows),
        segments(kept_rows) if segments(rows) is not None else None,
        {slot for slot in rows if slot is not None},
    )


def segments(rows: Sequence[int | None]) -> Segments | None:
    """Group rows by the slot of their adapter, each with weight 1; None when every row is base."""
    slots = sorted({slot for slot in rows if slot is not None})
    if not slots:
        return None
    groups = [[row for row, slot in enumerate(rows) if slot == wanted] for wanted in slots]
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group))
    tokens = [row for group in groups for row in group]
    return Segments(
        slot=torch.tensor(slots, dtype=torch.int32),
        start=torch.tensor(starts, dtype=torch.int32),
        token=torch.tensor(tokens, dtype=torch.int32),
        weight=torch.ones(len(tokens)),
    )


def plain_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """What transformers itself (eager attention, one request alone, no cache) says."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())

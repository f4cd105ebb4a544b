"""How far two adapters' next-token distributions are apart, over the positions of some prompts."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from adapters_store.info import Probe
from server.engine.request import GenerationRequest, SamplingParams, WeightedAdapter
from server.errors import EngineFailure
from server.patience import Stream, finished

# Of a prompt the last tokens count: two distributions of 49,152 tokens at 256 positions are 100 MB while compared.
MAX_TOKENS = 256
IMPOSSIBLE = 1e9  # nats: in place of the infinity by which a token falls that can no longer come
PROMPTS = (
    "The committee met on the 14th of March to decide whether the bridge over the river should be mended or replaced.",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long does the journey take?\nAnswer:",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return",
    "Dear Ms Alvarez,\n\nthank you for your letter of 3 May. I am writing to confirm that the order has been",
    '{"name": "kettle", "price": 24.9, "colours": ["red", "blue"], "in_stock": true, "weight_kg":',
    "She had never liked the sea, and yet here she was, standing at the railing of a ship, watching the lights of",
)


Adapters = tuple[WeightedAdapter, ...]


class Engine(Protocol):
    """What is needed of the engine, here and for trials."""

    async def submit(self, request: GenerationRequest) -> Stream: ...
    def discard(self, digest: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Divergence:
    """mean_kl, max_kl: KL(original || changed) in nats, over all positions; same_greedy: share of positions with equal
    likeliest token; positions: how many."""

    mean_kl: float
    max_kl: float
    same_greedy: float
    positions: int


async def measure(engine: Engine, prompts: Sequence[str], original: str, changed: str, tenant: str) -> Divergence:
    """Runs every prompt under both adapters (by digest), as ordinary requests of the batch, one prompt at a time.

    Raises what the engine says of a request: ContextTooLong, Overloaded, NotReady (no room for an adapter).
    """
    found = []
    for prompt in prompts:
        rows = await _both(engine, prompt, (WeightedAdapter(original),), WeightedAdapter(changed), tenant)
        found.append(await asyncio.to_thread(_compare, *rows))
    kl, same = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Divergence(float(kl.mean()), float(kl.max()), float(same.double().mean()), len(kl))


async def change(engine: Engine, prompt: str, adapter: WeightedAdapter, tenant: str) -> Probe:
    """What an adapter changes in the base's next-token distributions over a prompt; raises what `measure` raises."""
    return await asyncio.to_thread(_change, *await _both(engine, prompt, (), adapter, tenant))


async def _both(
    engine: Engine, prompt: str, original: Adapters, changed: WeightedAdapter, tenant: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    both = [
        asyncio.ensure_future(_distributions(engine, prompt, adapters, tenant)) for adapters in (original, (changed,))
    ]
    try:
        one, other = await asyncio.gather(*both)
    finally:  # when one fails, the other must not outlive the adapter that it asks for
        for each in both:
            each.cancel()
        await asyncio.gather(*both, return_exceptions=True)
    return one, other


async def _distributions(engine: Engine, prompt: str, adapters: Adapters, tenant: str) -> list[torch.Tensor]:
    """Log probabilities [vocabulary] after each token of the prompt, in order."""
    rows: dict[int, Any] = {}

    def keep(position: int, logits: torch.Tensor) -> None:
        # All that the engine's thread does for a probe. By numpy: on a loaded machine each call of torch on so many
        # numbers waits until another thread has come to its half of them.
        rows[position] = logits.cpu().numpy().copy()

    params = SamplingParams(max_tokens=0, temperature=0, truncate=MAX_TOKENS)
    stream = await engine.submit(
        GenerationRequest(f"probe-{secrets.token_hex(8)}", prompt, params, adapters, tenant, probe=keep)
    )
    await finished(stream)
    if not rows:
        raise EngineFailure("The probe of an adapter ended before it was computed.")
    return await asyncio.to_thread(_normalized, [rows[position] for position in sorted(rows)])


def _normalized(rows: list[Any]) -> list[torch.Tensor]:
    """Logits (numpy, float32) to log probabilities, in place."""
    logits = [torch.from_numpy(row) for row in rows]
    return [row.sub_(row.logsumexp(dim=-1)) for row in logits]


def _compare(original: list[torch.Tensor], changed: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """KL [positions] in float64 and whether the likeliest tokens are equal [positions]."""
    kl, same = [], []
    for one, other in zip(original, changed, strict=True):
        p = one.double()
        terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - other.double()))  # a token that cannot come adds nothing
        kl.append(terms.sum().clamp(min=0.0))
        same.append(one.argmax() == other.argmax())
    return torch.stack(kl), torch.stack(same)


def _change(base: list[torch.Tensor], adapted: list[torch.Tensor]) -> Probe:
    """In six digits, as every number of a report."""
    largest, other = 0.0, 0
    for one, two in zip(base, adapted, strict=True):
        apart = (one - two).abs().nan_to_num(nan=0.0, posinf=IMPOSSIBLE)  # NaN: a token that cannot come in either
        largest = max(largest, float(apart.max()))
        other += int(one.argmax() != two.argmax())
    return Probe(len(base), float(f"{largest:.6g}"), float(f"{other / len(base):.6g}"))

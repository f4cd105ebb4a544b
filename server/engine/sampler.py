"""Chooses next tokens from logits. A row's choice depends on its own logits, parameters, seed and position only."""

import hashlib
from dataclasses import dataclass

import torch

from server.engine.request import Candidate, SamplingParams

SMALLEST = 1e-6  # least divisor of logits: far smaller ones overflow float32, and this one is greedy already
_INVALID = -1  # in the place of a token: NaN logits


@dataclass(slots=True)
class SampleRow:
    """One row to sample: its parameters and what has been said so far.

    mask: int32 bitmask [ceil(vocabulary / 32)] of tokens that a grammar allows, or None; banned: tokens that may not
    come now (end-of-sequence before `min_tokens`).
    """

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int]
    banned: tuple[int, ...] = ()
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; logprob and top from the raw distribution, where asked for. token_id None: NaN logits."""

    token_id: int | None
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


def sample(logits: torch.Tensor, rows: list[SampleRow]) -> list[Sampled]:
    """Choose one token per row. logits: float32 [rows, vocabulary], not changed.

    The order is that of transformers' generation: penalties, bias and masks, temperature, top-k, top-p, min-p, typical.
    """
    largest, likeliest = logits.max(dim=-1)  # NaN counts as largest
    greedy = likeliest.where(largest.isfinite(), _INVALID).tolist()  # one copy: each waits for the device
    results = []
    for index, (token, row) in enumerate(zip(greedy, rows, strict=True)):
        plain = is_plain(row)
        if token == _INVALID:
            results.append(Sampled(None))
        elif plain and row.params.logprobs is None:  # before its logits are taken, which costs more than all of this
            results.append(Sampled(token))
        else:
            own = logits[index]
            results.append(_with_logprobs(own, token if plain else _choose(own, row), row.params.logprobs))
    return results


def is_plain(row: SampleRow) -> bool:
    """True if the arg max of the raw logits is the answer."""
    params = row.params
    return (
        params.temperature == 0
        and params.repetition_penalty == 1
        and not params.frequency_penalty
        and not params.presence_penalty
        and not params.logit_bias
        and not row.banned
        and row.mask is None
    )


def candidates(logprobs: torch.Tensor, count: int) -> tuple[Candidate, ...]:
    """The `count` likeliest tokens of one row of log probabilities [vocabulary]."""
    if not count:
        return ()
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    return tuple(Candidate(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the request's seed and the position of the token alone.

    So a result is the same in any batch, after preemption, and on any machine.
    """
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _choose(logits: torch.Tensor, row: SampleRow) -> int:
    params = row.params
    scores = _penalised(logits, row)
    if params.temperature == 0:
        return int(scores.argmax())
    scores = scores / max(params.temperature, SMALLEST)
    u = uniform(row.seed, len(row.output))
    if params.top_k <= 0 and params.top_p >= 1 and params.min_p <= 0 and params.typical_p >= 1:
        return int(_invert(scores.softmax(dim=-1), u))
    values, ids = _filtered(scores, params)
    return int(ids[_invert(values.softmax(dim=-1), u)])


def _penalised(logits: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """Repetition penalty over prompt and output (CTRL, arXiv 1909.05858), frequency and presence over the output."""
    params, scores = row.params, logits.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.prompt) | set(row.output)), device=logits.device)
        old, penalty = scores[seen], max(params.repetition_penalty, SMALLEST)
        scores[seen] = torch.where(old < 0, old * penalty, old / penalty)
    if row.output and (params.frequency_penalty or params.presence_penalty):
        ids, counts = torch.unique(torch.tensor(row.output, device=logits.device), return_counts=True)
        scores[ids] -= params.frequency_penalty * counts + params.presence_penalty
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        scores[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if row.mask is not None:
        scores.masked_fill_(~_unpack(row.mask, scores.shape[-1]), float("-inf"))
    if row.banned:
        banned = scores.clone()
        banned[list(row.banned)] = float("-inf")
        scores = banned if torch.isfinite(banned.amax()) else scores  # a grammar may allow nothing but the end
    return scores


def _filtered(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids that survive top-k, top-p, min-p and typical, likeliest first; at least one survives."""
    values, ids = scores.sort(descending=True, stable=True)
    if params.top_k > 0:
        values, ids = values[: params.top_k], ids[: params.top_k]
    if params.top_p < 1:
        probability = values.softmax(dim=-1)
        before = probability.cumsum(dim=-1, dtype=torch.float64) - probability
        keep = before < params.top_p
        keep[0] = True
        values, ids = values[keep], ids[keep]
    if params.min_p > 0:
        probability = values.softmax(dim=-1)
        keep = probability >= params.min_p * probability[0]
        values, ids = values[keep], ids[keep]
    if params.typical_p < 1:
        values, ids = _typical(values, ids, params.typical_p)
    return values, ids


def _typical(values: torch.Tensor, ids: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose surprise is nearest to the entropy, up to `mass` (arXiv 2202.00666)."""
    logprobs = values.log_softmax(dim=-1)
    probability = logprobs.exp()
    entropy = -(probability * logprobs.nan_to_num(neginf=0.0)).sum()
    order = (-logprobs - entropy).abs().argsort(stable=True)
    before = probability[order].cumsum(dim=-1, dtype=torch.float64) - probability[order]
    kept = order[before < mass] if mass > 0 else order[:1]
    kept = kept.sort().values
    return values[kept], ids[kept]


def _invert(probability: torch.Tensor, u: float) -> torch.Tensor:
    """Index at which the cumulative distribution first exceeds `u`; float64, for 50,000 addends lose digits."""
    cumulative = probability.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, cumulative[-1:] * u, right=True)[0]
    return index.clamp(max=int(probability.nonzero()[-1]))


def _unpack(mask: torch.Tensor, vocabulary: int) -> torch.Tensor:
    bits = (mask[:, None] >> torch.arange(32, device=mask.device)) & 1
    allowed = bits.flatten().bool()
    if allowed.shape[0] < vocabulary:
        allowed = torch.nn.functional.pad(allowed, (0, vocabulary - allowed.shape[0]))
    return allowed[:vocabulary]


def _with_logprobs(logits: torch.Tensor, token: int, count: int | None) -> Sampled:
    if count is None:
        return Sampled(token)
    logprobs = logits.log_softmax(dim=-1)
    return Sampled(token, float(logprobs[token]), candidates(logprobs, count))

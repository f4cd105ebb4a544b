"""Choosing tokens, against transformers' own processors and against arithmetic."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.engine.request import SamplingParams
from server.engine.sampler import SampleRow, _filtered, _penalised, _unpack, candidates, is_plain, sample, uniform

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def random_logits(seed: int, vocabulary: int = 500, rows: int = 1, scale: float = 3.0) -> torch.Tensor:
    """Zero mean, so that a wrong sign or a wrong row cannot hide."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    return logits - logits.mean(dim=-1, keepdim=True)


def row(
    params: SamplingParams | None = None,
    *,
    seed: int = 1,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    banned: tuple[int, ...] = (),
    mask: torch.Tensor | None = None,
) -> SampleRow:
    return SampleRow(params or SamplingParams(), seed, prompt or [0], output or [], banned, mask)


def distribution(logits: torch.Tensor, params: SamplingParams, own: SampleRow | None = None) -> torch.Tensor:
    """Our probabilities over the whole vocabulary, 0 for what the filters removed."""
    scores = _penalised(logits, own or row(params)) / params.temperature
    values, ids = _filtered(scores, params)
    return torch.zeros_like(scores).scatter(0, ids, values.softmax(dim=-1))


def theirs(logits: torch.Tensor, processors: list[Processor], ids: list[int]) -> torch.Tensor:
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([ids]), scores)
    return scores[0].softmax(dim=-1)


def mask_of(allowed: list[int], vocabulary: int) -> torch.Tensor:
    """A grammar's bit mask, as llguidance lays it out."""
    words = [0] * ((vocabulary + 31) // 32)
    for token in allowed:
        words[token // 32] |= 1 << (token % 32)
    signed = [word - (1 << 32) if word >= 1 << 31 else word for word in words]
    return torch.tensor(signed, dtype=torch.int32)


ONE_BY_ONE: list[tuple[SamplingParams, list[Processor]]] = [
    *((SamplingParams(temperature=t), [TemperatureLogitsWarper(t)]) for t in (0.2, 0.7, 1.5, 4.0)),
    *((SamplingParams(top_k=k), [TopKLogitsWarper(k)]) for k in (1, 2, 50, 499, 500, 10_000)),
    *((SamplingParams(top_p=p), [TopPLogitsWarper(p)]) for p in (0.001, 0.3, 0.9, 0.99)),
    *((SamplingParams(min_p=p), [MinPLogitsWarper(p)]) for p in (0.001, 0.1, 0.6, 1.0)),
    *((SamplingParams(typical_p=p), [TypicalLogitsWarper(p)]) for p in (0.05, 0.2, 0.7, 0.95)),
]


@pytest.mark.parametrize(("params", "processors"), ONE_BY_ONE)
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_each_filter_is_that_of_transformers(params: SamplingParams, processors: list[Processor], scale: float) -> None:
    for seed in range(4):
        logits = random_logits(seed, scale=scale)[0]
        own, other = distribution(logits, params), theirs(logits, processors, [0])
        assert torch.equal(own > 0, other > 0)
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_all_filters_together_in_the_order_of_transformers(seed: int) -> None:
    t, k, p, m, typical, penalty = [
        (0.7, 40, 0.9, 0.02, 0.8, 1.3),
        (1.4, 100, 0.95, 0.01, 0.9, 0.8),
        (0.9, 7, 0.5, 0.3, 0.5, 2.0),
    ][seed % 3]
    params = SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, typical_p=typical, repetition_penalty=penalty)
    prompt, output = [3, 4, 5, 5], [6, 3]
    logits = random_logits(seed)[0]
    processors: list[Processor] = [
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(t),
        TopKLogitsWarper(k),
        TopPLogitsWarper(p),
        MinPLogitsWarper(m),
        TypicalLogitsWarper(typical),
    ]
    own = distribution(logits, params, row(params, prompt=prompt, output=output))
    other = theirs(logits, processors, prompt + output)
    assert torch.equal(own > 0, other > 0)
    torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_covers_prompt_and_output_once_each(penalty: float) -> None:
    logits = random_logits(7)[0]
    own = _penalised(logits, row(SamplingParams(repetition_penalty=penalty), prompt=[1, 2, 2, 3, 3, 3], output=[3, 4]))
    other = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[1, 2, 2, 3, 3, 3, 3, 4]]), logits[None].clone())
    torch.testing.assert_close(own, other[0])
    assert (own != logits).nonzero().flatten().tolist() == [1, 2, 3, 4]


def test_frequency_and_presence_penalty_follow_the_formula_of_openai() -> None:
    """mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence, c counting the answer's tokens."""
    logits = random_logits(8)[0]
    output = [5, 5, 5, 9, 2, 9]
    own = _penalised(
        logits, row(SamplingParams(frequency_penalty=0.4, presence_penalty=-0.3), prompt=[7, 5], output=output)
    )
    expected = logits.clone()
    for token in set(output):
        expected[token] += -0.4 * output.count(token) + 0.3
    torch.testing.assert_close(own, expected)
    assert own[7] == logits[7], "the prompt is not penalised"


def test_logit_bias_is_added() -> None:
    logits = random_logits(9)[0]
    own = _penalised(logits, row(SamplingParams(logit_bias={3: 5.0, 499: -100.0})))
    assert float(own[3]) == pytest.approx(float(logits[3]) + 5)
    assert float(own[499]) == pytest.approx(float(logits[499]) - 100)
    assert torch.equal(own[4:499], logits[4:499])


def test_a_strong_bias_decides_greedily_and_by_chance() -> None:
    logits = random_logits(10)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, logit_bias={77: 100.0})
        assert sample(logits, [row(params)])[0].token_id == 77


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_banned_tokens_never_come(temperature: float) -> None:
    logits = random_logits(11)
    best = tuple(logits[0].topk(5).indices.tolist())
    for seed in range(20):
        params = SamplingParams(temperature=temperature)
        assert sample(logits, [row(params, seed=seed, banned=best)])[0].token_id not in best


def test_a_ban_yields_when_nothing_else_is_allowed() -> None:
    logits = random_logits(12)
    chosen = sample(logits, [row(SamplingParams(temperature=0), banned=(2,), mask=mask_of([2], 500))])[0]
    assert chosen.token_id == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocabulary", [500, 512, 33, 31])
def test_a_grammar_allows_only_its_mask(temperature: float, vocabulary: int) -> None:
    logits = random_logits(13, vocabulary)
    allowed = [0, 7, 30, vocabulary - 1]
    params = SamplingParams(temperature=temperature, top_k=2 * vocabulary, logit_bias={1: 100.0})
    seen = {
        sample(logits, [row(params, seed=seed, mask=mask_of(allowed, vocabulary))])[0].token_id for seed in range(60)
    }
    assert seen <= set(allowed)
    if temperature == 0:
        assert seen == {max(allowed, key=lambda token: float(logits[0, token]))}


def test_every_bit_of_a_mask_counts() -> None:
    for token in (0, 1, 30, 31, 32, 63, 64, 99):
        assert _unpack(mask_of([token], 100), 100).nonzero().flatten().tolist() == [token]
    assert _unpack(mask_of([3], 64), 100).shape == (100,), "tokens beyond the mask are not allowed"
    assert not _unpack(torch.full((2,), -1, dtype=torch.int32), 100)[64:].any()


def test_greedy_is_the_arg_max() -> None:
    logits = random_logits(14, rows=5)
    chosen = sample(logits, [row(SamplingParams(temperature=0)) for _ in range(5)])
    assert [c.token_id for c in chosen] == logits.argmax(dim=-1).tolist()


def test_greedy_respects_penalties() -> None:
    logits = torch.tensor([[2.0, 1.9, -5.0]])
    assert sample(logits, [row(SamplingParams(temperature=0, frequency_penalty=0.2), output=[0])])[0].token_id == 1
    assert sample(logits, [row(SamplingParams(temperature=0, repetition_penalty=1.2), prompt=[0])])[0].token_id == 1


@pytest.mark.parametrize(
    ("changed", "plain"),
    [
        (row(SamplingParams(temperature=0)), True),
        (row(SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1, typical_p=0.5)), True),
        (row(SamplingParams(temperature=0.1)), False),
        (row(SamplingParams(temperature=0, repetition_penalty=1.1)), False),
        (row(SamplingParams(temperature=0, frequency_penalty=0.1)), False),
        (row(SamplingParams(temperature=0, presence_penalty=-0.1)), False),
        (row(SamplingParams(temperature=0, logit_bias={1: 1.0})), False),
        (row(SamplingParams(temperature=0), banned=(1,)), False),
        (row(SamplingParams(temperature=0), mask=mask_of([1], 32)), False),
    ],
)
def test_what_takes_the_short_way(changed: SampleRow, plain: bool) -> None:
    assert is_plain(changed) is plain


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 1e-20, 1e-3])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_temperature_near_zero_is_greedy(temperature: float, top_k: int) -> None:
    logits = random_logits(15, rows=3)
    chosen = sample(logits, [row(SamplingParams(temperature=temperature, top_k=top_k), seed=s) for s in range(3)])
    assert [c.token_id for c in chosen] == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e-20, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_extreme_repetition_penalty_still_gives_a_likely_token(penalty: float, temperature: float) -> None:
    """A tiny penalty blows a seen token's positive logit up: that token it is, and no other."""
    logits = torch.tensor([[1.0, 3.0, -2.0, 0.5]])
    params = SamplingParams(repetition_penalty=penalty, temperature=temperature)
    chosen = sample(logits, [row(params, prompt=[0], output=[2])])[0]
    if penalty < 1:
        assert chosen.token_id == 0
    else:
        assert chosen.token_id in {0, 1, 3}


CHANCE: list[SamplingParams] = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(top_k=3),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.2, temperature=1.7),
    SamplingParams(typical_p=0.7),
]


@pytest.mark.parametrize("params", CHANCE, ids=str)
def test_frequencies_are_the_probabilities(params: SamplingParams) -> None:
    """Chi-square over 3,000 draws with fixed seeds, so the result is the same on every run."""
    logits = random_logits(16, vocabulary=8, scale=1.2)
    count = 3_000
    expected = (distribution(logits[0], params) * count).tolist()
    seen = [0] * 8
    for start in range(0, count, 500):
        rows = [row(params, seed=seed) for seed in range(start, start + 500)]
        for chosen in sample(logits.expand(500, -1), rows):
            assert chosen.token_id is not None
            seen[chosen.token_id] += 1
    assert all(s == 0 for s, e in zip(seen, expected, strict=True) if e == 0)
    chi = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True) if e > 0)
    assert chi < 24.3, "p = 0.001 with 7 degrees of freedom"


def test_uniform_is_even_and_in_its_bounds() -> None:
    numbers = [uniform(seed, position) for seed in range(40) for position in range(100)]
    assert all(0 <= u < 1 for u in numbers)
    assert len(set(numbers)) == len(numbers)
    tenths = [sum(int(u * 10) == tenth for u in numbers) for tenth in range(10)]
    assert sum((n - 400) ** 2 / 400 for n in tenths) < 27.9, "p = 0.001 with 9 degrees of freedom"


def test_neighbouring_positions_are_independent() -> None:
    pairs = [(uniform(seed, 0), uniform(seed, 1)) for seed in range(3_000)]
    covariance = sum((a - 0.5) * (b - 0.5) for a, b in pairs) / len(pairs)
    assert abs(covariance * 12) < 4 / math.sqrt(len(pairs))


def test_seed_and_position_decide_and_the_batch_does_not() -> None:
    logits = random_logits(17, rows=6)
    rows = [row(SamplingParams(temperature=0.9, top_p=0.95), seed=s, output=[1] * s) for s in range(6)]
    together = [c.token_id for c in sample(logits, rows)]
    assert together == [sample(logits[i : i + 1], [rows[i]])[0].token_id for i in range(6)]
    order = [4, 1, 5, 0, 3, 2]
    assert [together[i] for i in order] == [c.token_id for c in sample(logits[order], [rows[i] for i in order])]


def test_other_seeds_and_positions_choose_otherwise() -> None:
    logits = random_logits(18, scale=0.5)
    assert len({sample(logits, [row(seed=s)])[0].token_id for s in range(30)}) > 20
    assert len({sample(logits, [row(output=[1] * n)])[0].token_id for n in range(30)}) > 20
    assert len({sample(logits, [row(seed=-s)])[0].token_id for s in range(30)}) > 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_none_fail_their_row_only(bad: float, temperature: float) -> None:
    logits = random_logits(19, rows=3)
    clean = sample(logits, [row(SamplingParams(temperature=temperature, logprobs=1)) for _ in range(3)])
    logits[1, 250] = bad
    chosen = sample(logits, [row(SamplingParams(temperature=temperature, logprobs=1)) for _ in range(3)])
    assert chosen[1].token_id is None
    assert chosen[1].logprob is None
    assert [chosen[0], chosen[2]] == [clean[0], clean[2]]


def test_all_impossible_is_no_token_and_some_impossible_is_fine() -> None:
    logits = torch.full((2, 10), float("-inf"))
    logits[1, 4] = 1.0
    chosen = sample(logits, [row(), row()])
    assert [c.token_id for c in chosen] == [None, 4]


def test_the_logits_are_not_changed() -> None:
    logits = random_logits(20)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=2, frequency_penalty=1, logit_bias={1: 5.0}, top_k=4, logprobs=3)
    sample(logits, [row(params, output=[1, 2], banned=(3,), mask=mask_of([1, 2, 3], 500))])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("count", [0, 1, 5, 500, 600])
def test_logprobs_are_of_the_raw_distribution_and_sorted(count: int) -> None:
    logits = random_logits(21)
    raw = logits[0].log_softmax(dim=-1)
    params = SamplingParams(temperature=0.3, top_k=9, repetition_penalty=1.5, logit_bias={8: 3.0}, logprobs=count)
    chosen = sample(logits, [row(params)])[0]
    assert chosen.token_id is not None
    assert chosen.logprob == pytest.approx(float(raw[chosen.token_id]))
    assert len(chosen.top) == min(count, 500)
    assert [c.token_id for c in chosen.top] == raw.argsort(descending=True)[: len(chosen.top)].tolist()
    assert all(c.logprob == pytest.approx(float(raw[c.token_id])) for c in chosen.top)
    assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(chosen.top))


def test_logprobs_come_only_when_asked_for() -> None:
    logits = random_logits(22)
    assert sample(logits, [row()])[0].logprob is None
    assert sample(logits, [row()])[0].top == ()
    assert sample(logits, [row(SamplingParams(logprobs=0))])[0].top == ()
    assert candidates(logits[0], 0) == ()


@pytest.mark.parametrize(("params", "kept"), [(SamplingParams(top_p=1e-9), 1), (SamplingParams(top_p=0.0), 1)])
def test_at_least_one_token_survives(params: SamplingParams, kept: int) -> None:
    logits = random_logits(23)
    assert int((distribution(logits[0], params) > 0).sum()) == kept
    assert sample(logits, [row(params)])[0].token_id == int(logits.argmax())
    typical = SamplingParams(typical_p=1e-9)
    assert int((distribution(logits[0], typical) > 0).sum()) == 1
    assert int((distribution(logits[0], SamplingParams(min_p=1.0)) > 0).sum()) == 1


def test_ties_are_cut_to_exactly_top_k() -> None:
    logits = torch.zeros(1, 10)
    seen = {sample(logits, [row(SamplingParams(top_k=3), seed=seed)])[0].token_id for seed in range(100)}
    assert len(seen) == 3

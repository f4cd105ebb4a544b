"""Paged, chunked, batched runs of a prepared model against transformers' own forward."""

import pytest
import torch

from server.model.errors import ModelLoadError
from server.model.loader import describe
from server.model.prepare import forward, prepare_model
from tests.model.paged import PAGE, attach_cache, difference, plain_logits, prepared, random_requests, run, step
from tests.support.models import TINY_ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_paged_logits_equal_transformers(architecture: str) -> None:
    base, context = prepared(architecture)
    plain = tiny_model(architecture)
    requests = random_requests([41, 1, 17, 30], VOCABULARY, seed=1)
    for request, logits in zip(requests, run(base, context, requests, seed=2), strict=True):
        expected = plain_logits(plain, request.tokens)
        assert difference(logits, expected) < 1e-4
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text", "starcoder2"])
def test_the_window_matters_and_has_the_right_edge(architecture: str) -> None:
    requests = random_requests([41], VOCABULARY, seed=1)
    plain = plain_logits(tiny_model(architecture), requests[0].tokens)
    for wrong in (11, 13):
        other = plain_logits(tiny_model(architecture, sliding_window=wrong), requests[0].tokens)
        assert difference(other, plain) > 1e-3


def test_a_request_does_not_see_its_batch_mates() -> None:
    base, context = prepared("llama")
    alone = random_requests([20], VOCABULARY, seed=3)
    logits_alone = run(base, context, alone, seed=0, largest=20)[0]
    together = random_requests([20, 33, 9], VOCABULARY, seed=3)
    assert together[0].tokens == alone[0].tokens
    assert difference(run(base, context, together, seed=5)[0], logits_alone) < 1e-5


def test_only_kept_rows_reach_the_head() -> None:
    base, context = prepared("qwen2")
    whole = random_requests([10, 6], VOCABULARY, seed=4)
    every = step(base, context, whole, [10, 6])
    again = random_requests([10, 6], VOCABULARY, seed=4)
    kept = step(base, context, again, [10, 6], kept=torch.tensor([15, 9]))
    assert kept.shape == (2, VOCABULARY)
    assert kept.dtype == torch.float32
    assert difference(kept, every[[15, 9]]) < 1e-5


def test_a_step_may_keep_no_row() -> None:
    base, context = prepared("llama")
    kept = step(base, context, random_requests([5], VOCABULARY, seed=4), [5], kept=torch.tensor([], dtype=torch.int64))
    assert kept.shape == (0, VOCABULARY)


def test_bfloat16_runs_with_a_bfloat16_pool() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    base = describe(model, tiny_tokenizer(), "tiny/llama")
    context = prepare_model(base)
    attach_cache(base, context)
    requests = random_requests([19, 8], VOCABULARY, seed=1)
    logits = run(base, context, requests, seed=2)
    assert logits[0].dtype == torch.float32
    assert difference(logits[0], plain_logits(tiny_model("llama"), requests[0].tokens)) < 0.1


def test_tokens_land_in_the_pages_they_were_given() -> None:
    base, context = prepared("llama")
    requests = random_requests([2 * PAGE + 1], VOCABULARY, seed=6)
    run(base, context, requests, seed=0)
    assert context.cache is not None
    written = ~context.cache.buffer.isnan().any(dim=-1).any(dim=-1)  # [pages, layers, 2, page]
    tokens_in_page = written[:, :, :, :].sum(dim=-1)
    expected = torch.zeros_like(tokens_in_page)
    for page, count in zip(requests[0].pages, (PAGE, PAGE, 1), strict=True):
        expected[page] = count
    assert torch.equal(tokens_in_page, expected)


def test_a_step_without_a_cache_fails_clearly() -> None:
    base, context = prepared("llama")
    context.cache = None
    one = torch.tensor([1])
    with pytest.raises(RuntimeError, match="before the model runner"):
        forward(base, context, one, torch.tensor([0]), torch.tensor([0]))


REFUSED = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320},  # alibi
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320},  # own attention
    "gpt_oss": {**TINY_ARCHITECTURES["llama"], "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "llama4_text": {**TINY_ARCHITECTURES["llama"], "num_local_experts": 2},  # chunked attention
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320},  # no attention at all
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_attention_that_cannot_be_paged_is_refused_at_load(architecture: str) -> None:
    model = tiny_model(architecture, **REFUSED[architecture])
    with pytest.raises(ModelLoadError):
        prepare_model(describe(model, tiny_tokenizer(), f"tiny/{architecture}"))


def test_a_bidirectional_model_is_refused() -> None:
    model = tiny_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ModelLoadError, match="direction"):
        prepare_model(describe(model, tiny_tokenizer(), "tiny/both-ways"))

"""The generator example: checkpoints, task vectors, adapters put on and read back, and its table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters_store.forms import LowRank
from adapters_store.generation.training import EpochLoss
from deploy.examples import generator_samples
from deploy.examples.generator_samples import LAYERS, Adapter, apply, checkpoints, condition, mean, read
from deploy.examples.tasks import TASKS
from deploy.examples.train import Recipe
from deploy.examples.train_generator import HELD_OUT, KEPT, LEARNT, Asked, draw, table
from server.model.loader import load_base_model
from tests.support.models import tiny_model, tiny_tokenizer

PROMPTS = ["abc", "a longer one"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tuned() -> Any:
    """A tiny model with an adapter that changes something."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"]))
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.5)
    return model


def adapter_of(model: Any, seed: int) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            shapes = (module.lora_A["default"].weight.shape, module.lora_B["default"].weight.shape)
            a, b = (torch.randn(shape, generator=drawn) for shape in shapes)
            found[name] = LowRank(a, b, torch.full((2,), 3.0))
    return found


@torch.inference_mode()
def expected(model: Any, tokenizer: Any, prompt: str, calls: int) -> torch.Tensor:
    """By whole forward passes without a cache: the input of the final norm at the last position, mean over passes."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    seen: list[torch.Tensor] = []
    norm = next(module for name, module in model.named_modules() if name.endswith("model.norm"))
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, -1].clone()))
    for _ in range(calls):
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    hook.remove()
    return torch.stack(seen).mean(0)


def test_a_task_vector_is_that_of_the_models_hidden_states(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_samples, "NEW_TOKENS", 3)
    tuned.generation_config.eos_token_id = None  # three calls each
    tokenizer = tiny_tokenizer()
    found = condition(tuned, tokenizer, PROMPTS)
    wanted = torch.stack([expected(tuned, tokenizer, prompt, 3) for prompt in PROMPTS]).mean(0)
    assert torch.allclose(found, wanted, atol=1e-4)
    with tuned.disable_adapter():
        assert not torch.allclose(condition(tuned, tokenizer, PROMPTS), found, atol=1e-2)


def test_an_adapter_is_put_on(tuned: Any) -> None:
    ids = torch.tensor([[1, 2, 3]])
    logits = []
    for seed in (1, 2):
        adapter = adapter_of(tuned, seed)
        apply(tuned, adapter)
        for name, form in adapter.items():
            module = tuned.base_model.model.get_submodule(name)
            delta = module.get_delta_weight("default")
            assert torch.allclose(delta, form.b * form.d @ form.a, atol=1e-5)
        with torch.inference_mode():
            logits.append(tuned(input_ids=ids).logits)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_the_mean_of_adapters(tuned: Any) -> None:
    one, other = adapter_of(tuned, 1), adapter_of(tuned, 2)
    for name, form in mean([one, other]).items():
        assert torch.allclose(form.a, (one[name].a + other[name].a) / 2)
        assert torch.allclose(form.b, (one[name].b + other[name].b) / 2)


@pytest.mark.deep
def test_checkpoints_are_those_of_the_last_steps(tmp_path: Path) -> None:
    base = load_base_model("smollm2", dtype=torch.float32)
    recipe = Recipe(generator_samples.LORA, steps=3, batch=2, rate=6e-3, items=6)
    out = tmp_path / "casing"
    bare = checkpoints(base.model, base.tokenizer, TASKS["casing"], recipe, 2, 0, out)
    assert sorted(each.name for each in out.iterdir()) == ["0002", "0003"]
    first, last = read(out, base.spec)
    assert len(first) == len(LAYERS)
    assert all(not torch.equal(form.b, last[name].b) for name, form in first.items())
    assert not [name for name, _ in bare.named_parameters() if "lora" in name]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert checkpoints(bare, base.tokenizer, TASKS["casing"], recipe, 2, 0, out) is bare
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_held_out_task_is_not_learnt() -> None:
    assert HELD_OUT not in LEARNT
    assert {*LEARNT, HELD_OUT} <= TASKS.keys()
    assert KEPT > 1


def test_the_table_and_the_curve(tmp_path: Path) -> None:
    text = table([Asked("one", "none", 1, 4), Asked("one", "trained", 4, 4), Asked("other", "trained", 2, 4)])
    assert text.splitlines() == [
        "| adapter | `one` | `other` |",
        "|---|---|---|",
        "| none | 25 % |  |",
        "| trained | 100 % | 50 % |",
    ]
    draw([EpochLoss(epoch, 1 / epoch, 0.1) for epoch in range(1, 4)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

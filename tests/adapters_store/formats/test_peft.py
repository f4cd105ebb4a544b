"""The importer against PEFT itself: equal dense deltas, equal biases, equal logits."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from adapters_store.errors import AdapterInvalid
from adapters_store.formats import peft, peft_plan
from adapters_store.forms import AdapterWeights, BaseSpec, Delta, LowRank, ReplacedWeight
from adapters_store.limits import Limits
from tests.adapters_store.support import spec_of
from tests.support.models import VOCABULARY, tiny_model

LIMITS = Limits()
LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12}),
    "all modules": ("llama", {"target_modules": LLAMA_ALL, "r": 3}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 2}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "r": 5, "lora_alpha": 7, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 2,
            "rank_pattern": {"q_proj": 5, r".*\.1\.self_attn\.v_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "down_proj": 7.5},
        },
    ),
    "patterns with rslora": (
        "llama",
        {
            "target_modules": LLAMA_ALL,
            "rank_pattern": {"up_proj": 7},
            "alpha_pattern": {"up_proj": 1},
            "use_rslora": True,
        },
    ),
    "regex": ("llama", {"target_modules": r".*layers\.[02]\.(self_attn\.k|mlp\.up)_proj", "r": 2}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "r": 2}),
    "bias of B": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "r": 2, "lora_alpha": 5}),
    "biases of base and B": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True, "r": 2}),
    "untied head": ("qwen2", {"target_modules": ["lm_head", "q_proj"], "r": 2}),
    "tied head": ("llama", {"target_modules": ["lm_head"], "r": 3, "lora_alpha": 9}),
    "tied embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 9}),
    "tied embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 3}),
    "scaled embedding": ("gemma", {"target_modules": ["embed_tokens", "v_proj"], "r": 3}),
    "head saved": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}),
    "tied head saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 3}),
    "conv1d all-linear": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True, "r": 2}),
    "conv1d, flag forgotten": ("gpt2", {"target_modules": ["c_fc"], "r": 2}),
    "conv1d bias": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "lora_bias": True, "r": 2}),
    "conv1d embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True, "r": 2}),
    "conv1d head": ("gpt2", {"target_modules": ["lm_head", "c_attn"], "fan_in_fan_out": True, "r": 2}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "r": 4}),
    "experts' siblings": ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"], "r": 2}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.5, "r": 2}),
    "flag on a linear": ("llama", {"target_modules": ["q_proj"], "fan_in_fan_out": True, "r": 2}),
    "gaussian start": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "r": 2}),
    "excluded": ("llama", {"target_modules": LLAMA_ALL, "exclude_modules": r".*mlp.*", "r": 2}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on tied weights and flags are the cases under test
        yield


def trained(architecture: str, seed: int = 0, **options: Any) -> tuple[Any, PeftModel]:
    """A base and a PEFT model on a copy of it, all its trained parts random."""
    base = tiny_model(architecture)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(**{"task_type": "CAUSAL_LM", **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.3)
    return base, adapted.eval()


def imported(folder: Path, base: Any, limits: Limits = LIMITS) -> tuple[peft.Imported, AdapterWeights]:
    config, weights, spec = (folder / peft.CONFIG_FILE).read_bytes(), folder / peft.WEIGHTS_FILE, spec_of(base)
    return peft.inspect(config, weights, spec, limits), peft.Loader(spec, limits).load(config, weights, "d" * 64)


def dense(form: LowRank) -> torch.Tensor:
    return (form.b.double() * form.d.double()) @ form.a.double()


def served(base: Any, weights: AdapterWeights, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the base with the forms applied as `forms.py` describes them."""
    model = copy.deepcopy(base)
    for name, forms in weights.modules.items():
        for form in forms:
            assert isinstance(form, Delta | ReplacedWeight)
            whole = form if isinstance(form, ReplacedWeight) else form.widened()
            model.get_submodule(name).register_forward_hook(_hook(whole))
    with torch.inference_mode():
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


def _hook(form: LowRank | ReplacedWeight) -> Any:
    def apply(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        if isinstance(form, ReplacedWeight):
            return F.linear(x, form.weight, form.bias)
        low = F.embedding(x, form.a.T) if isinstance(module, torch.nn.Embedding) else F.linear(x, form.a)
        return output + F.linear(low * form.d, form.b, form.bias)

    return apply


@pytest.mark.parametrize(("architecture", "options"), CASES.values(), ids=CASES)
def test_equals_peft(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    base, adapted = trained(architecture, **options)
    adapted.save_pretrained(tmp_path)
    found, weights = imported(tmp_path, base)

    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }
    lowrank = {name: form for name, forms in weights.modules.items() for form in forms if isinstance(form, LowRank)}
    assert lowrank.keys() == layers.keys()
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").double()
        scale = float(getattr(layer.get_base_layer(), "embed_scale", 1.0))
        flipped = delta.T if spec_of(base).modules[name].kind != "linear" else delta
        torch.testing.assert_close(dense(lowrank[name]), flipped * scale, rtol=1e-5, atol=1e-6)
        bias = None if name.endswith(("embed_tokens", "wte", "wpe")) else layer.lora_B["default"].bias
        assert (lowrank[name].bias is None) == (bias is None)
        if bias is not None:
            torch.testing.assert_close(lowrank[name].bias, bias.detach() * layer.scaling["default"])

    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = adapted(ids, use_cache=False).logits
        plain = base(ids, use_cache=False).logits
    torch.testing.assert_close(served(base, weights, ids), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.05  # the adapter moves the output, so equality says something
    ranks = [layer.r["default"] for layer in layers.values()]
    assert (found.rank, found.modules["matched"]) == ({"min": min(ranks), "max": max(ranks)}, len(weights.modules))
    trainable = {name: p for name, p in adapted.named_parameters() if "lora_" in name or "modules_to_save" in name}
    assert found.parameters == sum(p.numel() for p in trainable.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_keep_their_own_type(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapted = trained("llama", target_modules=["q_proj"], r=2)
    adapted.save_pretrained(tmp_path)
    tensors = {name: value.to(dtype) for name, value in load_file(tmp_path / peft.WEIGHTS_FILE).items()}
    save_file(tensors, tmp_path / peft.WEIGHTS_FILE)
    for forms in imported(tmp_path, base)[1].modules.values():
        (form,) = forms
        assert isinstance(form, LowRank)
        assert (form.a.dtype, form.b.dtype, form.d.dtype) == (dtype, dtype, torch.float32)


def test_factors_of_two_types_take_the_wider(tmp_path: Path) -> None:
    base, adapted = trained("llama", target_modules=["q_proj"], r=2)
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / peft.WEIGHTS_FILE)
    mixed = {name: value.bfloat16() if "lora_A" in name else value.half() for name, value in tensors.items()}
    save_file(mixed, tmp_path / peft.WEIGHTS_FILE)
    name = "model.layers.0.self_attn.q_proj"
    (form,) = imported(tmp_path, base)[1].modules[name]
    assert isinstance(form, LowRank)
    assert form.a.dtype == form.b.dtype == torch.float32
    assert torch.equal(form.a, mixed[f"base_model.model.{name}.lora_A.weight"].float())
    assert torch.equal(form.b, mixed[f"base_model.model.{name}.lora_B.weight"].float())


def test_a_head_saved_whole_with_its_bias(tmp_path: Path) -> None:
    base, adapted = trained("phi", target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    adapted.save_pretrained(tmp_path)
    _, weights = imported(tmp_path, base)
    (form,) = weights.modules["lm_head"]
    saved = adapted.base_model.model.lm_head.modules_to_save["default"]
    assert isinstance(form, ReplacedWeight)
    assert torch.equal(form.weight, saved.weight)
    assert form.bias is not None
    assert torch.equal(form.bias, saved.bias)


def test_trained_without_the_head_or_kept_under_a_name(tmp_path: Path) -> None:
    base, adapted = trained("llama", target_modules=["q_proj"], r=2)
    adapted.save_pretrained(tmp_path)
    _, expected = imported(tmp_path, base)
    tensors = load_file(tmp_path / peft.WEIGHTS_FILE)
    for old, new in (("model.model.", "model."), (".weight", ".default.weight"), ("base_model.model.", "")):
        path = tmp_path / f"without {old}"
        path.mkdir()
        (path / peft.CONFIG_FILE).write_bytes((tmp_path / peft.CONFIG_FILE).read_bytes())
        save_file({name.replace(old, new): value for name, value in tensors.items()}, path / peft.WEIGHTS_FILE)
        _, found = imported(path, base)
        assert found.modules.keys() == expected.modules.keys()
        for name, (form,) in found.modules.items():
            assert isinstance(form, LowRank)
            (other,) = expected.modules[name]
            assert isinstance(other, LowRank)
            assert torch.equal(dense(form), dense(other))


def test_equal_files_give_equal_fields(tmp_path: Path) -> None:
    base, adapted = trained("llama", target_modules=LLAMA_ALL, r=2)
    adapted.save_pretrained(tmp_path)
    first, second = imported(tmp_path, base)[0], imported(tmp_path, base)[0]
    assert json.dumps(first.manifest_fields()) == json.dumps(second.manifest_fields())


def test_a_copy_of_the_base_must_be_the_bases(tmp_path: Path) -> None:
    """PEFT would put the file's embedding in place of ours, so one that differs makes another model."""
    base, adapted = trained("llama", target_modules=["embed_tokens"], r=2)
    adapted.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / peft.WEIGHTS_FILE)
    assert imported(tmp_path, base.to(torch.bfloat16))[0].warnings == ()  # rounding is no difference
    other = tiny_model("llama", seed=1)
    with pytest.raises(AdapterInvalid) as caught:
        imported(tmp_path, other)
    assert caught.value.code == "base_mismatch"


def test_a_copy_that_cannot_be_compared_is_told(tmp_path: Path) -> None:
    base, adapted = trained("llama", target_modules=["embed_tokens"], r=2)
    adapted.save_pretrained(tmp_path)
    spec = spec_of(base)
    blind = BaseSpec(spec.id, spec.fingerprint, spec.modules, spec.head, spec.tied)
    config, weights = (tmp_path / peft.CONFIG_FILE).read_bytes(), tmp_path / peft.WEIGHTS_FILE
    assert [notice["code"] for notice in peft.inspect(config, weights, blind, LIMITS).warnings] == ["base_copy_ignored"]


class TestLoader:
    """Plans are kept between loads; what is loaded is of the very file that was asked for."""

    @staticmethod
    def saved(folder: Path, seed: int, **options: Any) -> tuple[Any, bytes, Path]:
        base, adapted = trained("llama", seed, **{"target_modules": ["q_proj"], "r": 2, **options})
        adapted.save_pretrained(folder)
        return base, (folder / peft.CONFIG_FILE).read_bytes(), folder / peft.WEIGHTS_FILE

    @staticmethod
    def only(weights: AdapterWeights) -> LowRank:
        form = next(iter(weights.modules.values()))[0]
        assert isinstance(form, LowRank)
        return form

    def test_adapters_of_one_recipe_share_a_plan_and_no_values(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, config, first = self.saved(tmp_path / "first", 1)
        _, _, second = self.saved(tmp_path / "second", 2)
        make = Mock(wraps=peft_plan.make)
        monkeypatch.setattr(peft_plan, "make", make)
        loader = peft.Loader(spec_of(base), LIMITS)
        forms = [self.only(loader.load(config, path, "d" * 64)) for path in (first, second, first)]
        assert make.call_count == 1
        assert not torch.equal(forms[0].a, forms[1].a)
        assert torch.equal(forms[0].a, forms[2].a)
        expected = load_file(second)
        assert torch.equal(forms[1].a, next(tensor for name, tensor in expected.items() if "lora_A" in name))

    def test_another_config_or_rank_is_another_plan(self, tmp_path: Path) -> None:
        base, _, _ = self.saved(tmp_path / "plain", 1)
        loader = peft.Loader(spec_of(base), LIMITS)
        for number, options in enumerate([{"lora_alpha": 4}, {"lora_alpha": 6}, {"lora_alpha": 6, "r": 3}]):
            _, config, path = self.saved(tmp_path / str(number), 1, **options)
            form = self.only(loader.load(config, path, "d" * 64))
            assert form.rank == options.get("r", 2)
            assert form.d.tolist() == pytest.approx([options["lora_alpha"] / form.rank] * form.rank)

    def test_only_so_many_plans_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peft, "PLANS", 2)
        base, config, path = self.saved(tmp_path, 1)
        loader = peft.Loader(spec_of(base), LIMITS)
        for spaces in range(4):
            loader.load(config + b" " * spaces, path, "d" * 64)
            assert len(loader._plans) <= 2

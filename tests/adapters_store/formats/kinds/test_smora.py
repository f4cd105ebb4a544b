"""SMoRA against the authors' formula, written out in `tests.support.smora`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import GatedLowRank
from tests.adapters_store.formats.kinds.support import IDS, edit_config, edit_tensors, imported
from tests.support import dense_forms, smora
from tests.support.models import tiny_model
from tests.support.smora import Tensors

TARGETS = {"llama": smora.TARGETS, "gpt2": ("c_attn", "c_proj"), "qwen2": ("k_proj", "up_proj")}
Change = Callable[[Tensors], None]


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(("r", "active", "partition"), [(8, 3, 1), (6, 4, 2), (1, 1, 1), (16, 16, 4)])
def test_equals_the_formula(tmp_path: Path, architecture: str, r: int, active: int, partition: int) -> None:
    base = tiny_model(architecture)
    folders = [
        smora.make(
            base,
            tmp_path / str(seed),
            r=r,
            activate_r=active,
            rank_partition=partition,
            targets=TARGETS[architecture],
            seed=seed,
        )
        for seed in range(2)
    ]
    found, weights = imported(folders[0], base)
    assert (found.kind, found.forms, found.rank) == ("smora", ("gated_low_rank",), {"min": r, "max": r})
    with torch.inference_mode():
        expected, plain = smora.adapted(base, (folders[0], 1.0))(IDS).logits, base(IDS).logits
    ours = dense_forms.logits(base, weights, IDS)
    scale = float((expected - plain).abs().max())
    assert scale > 1e-2, "the adapter changes nothing, so nothing is tested"
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    other = dense_forms.logits(base, imported(folders[1], base)[1], IDS)
    assert float((other - expected).abs().max()) > 0.01 * scale, "another adapter gives the same"


def test_the_scale_is_alpha_over_the_ranks_in_use(tmp_path: Path) -> None:
    base = tiny_model("llama")
    _, weights = imported(smora.make(base, tmp_path, r=8, activate_r=4, alpha=6.0, dtype=torch.bfloat16), base)
    for (form,) in weights.modules.values():
        assert isinstance(form, GatedLowRank)
        assert form.d.tolist() == [1.5] * 8
        assert form.active == 4
        assert form.a.dtype == form.b.dtype == form.router.dtype == torch.bfloat16
        assert form.router_bias is not None
        assert form.router_bias.dtype == torch.float32


def test_biases_of_zero_are_none(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = smora.make(base, tmp_path)

    def reset(tensors: Tensors) -> None:
        for name in tensors:
            if "biases" in name:
                tensors[name].zero_()

    edit_tensors(folder, reset)
    _, weights = imported(folder, base)
    assert all(form.router_bias is None for (form,) in weights.modules.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"activate_r": 9}, "bad_config", "`activate_r` 9"),
        ({"activate_r": 0}, "bad_config", "`activate_r` 0"),
        ({"activate_r": "2"}, "bad_config", "activate_r"),
        ({"rank_partition": 3}, "bad_config", "`rank_partition` 3"),
        ({"rank_partition": 0}, "bad_config", "`rank_partition` 0"),
        ({"use_dora": True}, "feature_unsupported", "use_dora"),
        ({"use_rslora": True}, "feature_unsupported", "use_rslora"),
        ({"rank_pattern": {"q_proj": 4}}, "feature_unsupported", "rank_pattern"),
        ({"bias": "all"}, "feature_unsupported", 'bias "all"'),
        ({"top_p": 0.5}, "bad_config", "top_p"),
        ({"r": 16}, "shape_mismatch", "lora_A"),
        ({"rank_partition": 2}, "shape_mismatch", "lora_router"),
    ],
    ids=str,
)
def test_a_bad_config_is_refused(tmp_path: Path, fields: dict[str, Any], code: str, said: str) -> None:
    base = tiny_model("llama")
    folder = smora.make(base, tmp_path)
    edit_config(folder, **fields)
    with pytest.raises(AdapterInvalid, match=said) as caught:
        imported(folder, base)
    assert caught.value.code == code


def drop(part: str) -> Change:
    def change(tensors: Tensors) -> None:
        del tensors[next(name for name in tensors if part in name)]

    return change


def put(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if part in name)
        tensors[name] = make(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (drop("lora_A"), "shape_mismatch", "lora_A"),
        (drop("lora_router"), "shape_mismatch", "lora_router"),
        (drop("lora_biases"), "shape_mismatch", "lora_biases"),
        (put("lora_router", lambda t: t[:-1].clone()), "shape_mismatch", "lora_router"),
        (put("lora_biases", lambda t: t[:, None].clone()), "shape_mismatch", "lora_biases"),
        (put("lora_B", lambda t: t.T.contiguous()), "shape_mismatch", "lora_B"),
        (put("lora_biases", lambda t: torch.full_like(t, torch.nan)), "nonfinite_weights", "lora_biases"),
        (put("lora_router", lambda t: torch.full_like(t, torch.inf)), "nonfinite_weights", "lora_router"),
    ],
)
def test_bad_tensors_are_refused(tmp_path: Path, change: Change, code: str, said: str) -> None:
    base = tiny_model("llama")
    folder = smora.make(base, tmp_path)
    edit_tensors(folder, change)
    with pytest.raises(AdapterInvalid, match=said) as caught:
        imported(folder, base)
    assert caught.value.code == code


def test_an_embedding_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = smora.make(base, tmp_path)
    edit_config(folder, target_modules=[*smora.TARGETS, "embed_tokens"])

    def add(tensors: Tensors) -> None:
        stem = next(name for name in tensors if "q_proj.lora_A" in name).removesuffix(".lora_A.weight")
        for part in ("lora_A.weight", "lora_B.weight", "lora_router.weight", "lora_biases"):
            tensors[f"base_model.model.model.embed_tokens.{part}"] = tensors[f"{stem}.{part}"].clone()

    edit_tensors(folder, add)
    with pytest.raises(AdapterInvalid, match="embedding") as caught:
        imported(folder, base)
    assert caught.value.code == "feature_unsupported"

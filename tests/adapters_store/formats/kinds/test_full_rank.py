"""Full deltas, BitDelta and Bone against dense weights; Bone also against PEFT, whose MISS took it over."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig
from safetensors.torch import load_file, save_file

from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.outside import (
    TARGETS,
    Adapt,
    Make,
    Parts,
    added,
    check,
    check_refusals,
    normal,
    refused,
    write,
)
from tests.adapters_store.formats.kinds.support import IDS, edit_config, edit_tensors, imported, trained
from tests.support import dense_forms
from tests.support.models import tiny_model

FULL, BITS = {"peft_type": "FULL_DELTA"}, {"peft_type": "BITDELTA"}
BONE = {"peft_type": "BONE", "r": 8, "init_weights": True}


def difference(dtype: torch.dtype, transposed: bool) -> Make:
    def make(weight: torch.Tensor, bias: torch.Tensor | None, generator: torch.Generator) -> Parts:
        delta = (normal(generator, *weight.shape) * 0.2).to(dtype)
        parts = {"delta": delta.T if transposed else delta}
        return parts if bias is None else {**parts, "delta_bias": normal(generator, len(bias))}

    return make


def with_difference(transposed: bool) -> Adapt:
    def adapt(weight: torch.Tensor, bias: torch.Tensor | None, parts: Parts) -> tuple[torch.Tensor, Any]:
        delta = parts["delta"].float()
        return weight + (delta.T if transposed else delta), None if bias is None else bias + parts["delta_bias"]

    return adapt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", TARGETS)
def test_a_whole_difference(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    turned = architecture == "gpt2"
    found = check(architecture, FULL, tmp_path, difference(dtype, turned), with_difference(turned))
    assert (found.kind, found.rank["max"]) == ("full_delta", 0)
    assert found.forms == (("dense",) if architecture == "llama" else ("dense", "output_scale"))


def eight_bits(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    delta = normal(generator, *weight.shape)
    scale = delta.abs().amax(1) / 127
    return {"delta": (delta / scale[:, None]).round().to(torch.int8), "delta_scale": scale}


def test_a_difference_of_eight_bits(tmp_path: Path) -> None:
    delta = added(lambda weight, parts: parts["delta_scale"][:, None] * parts["delta"].float())
    check("llama", FULL, tmp_path, eight_bits, delta)
    base = tiny_model("llama")

    def drop(tensors: Parts) -> None:
        for name in [name for name in tensors if name.endswith("delta_scale")]:
            del tensors[name]

    edit_tensors(tmp_path / "a", drop)
    refused(tmp_path / "a", base, "shape_mismatch", "delta_scale")


def test_the_bytes_of_a_difference_are_bounded(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", FULL, tmp_path, difference(torch.float32, False))
    refused(tmp_path, base, "adapter_too_large", limits=Limits(form_bytes=30_000))


def packed(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    """As the authors' `pack`: 32 rows of the transposed mask in one integer, lowest bit first."""
    diff = normal(generator, *weight.shape)
    mask = (diff >= 0).T
    words = mask.reshape(mask.shape[0] // 32, 32, mask.shape[1]).long() << torch.arange(32)[None, :, None]
    return {"mask": words.sum(1).to(torch.int32), "coeff": diff.abs().mean()}


def unpacked(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """As the authors' `unpack`, and 0 meaning -1."""
    bits = (parts["mask"][:, None, :] >> torch.arange(32)[None, :, None]) & 1
    return parts["coeff"] * (bits.reshape(-1, parts["mask"].shape[1]).float() * 2 - 1).T


@pytest.mark.parametrize("architecture", TARGETS)
def test_bitdelta_equals_the_authors_packing(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, BITS, tmp_path, packed, added(unpacked))
    assert (found.kind, found.forms) == ("bitdelta", ("dense",))


def test_a_mask_of_another_type_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    tensors = write(base, "llama", BITS, tmp_path, packed)
    name = next(name for name in tensors if name.endswith("mask"))
    edit_tensors(tmp_path, lambda found: found.update({name: found[name].float()}))
    refused(tmp_path, base, "bad_dtype", "mask")


def block(weight: torch.Tensor, bias: object, generator: torch.Generator, rank: int = 8) -> Parts:
    return {"bone_block": normal(generator, rank, weight.shape[0])}


def repeated(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    rank = len(parts["bone_block"])
    return torch.stack([parts["bone_block"][i % rank] for i in range(weight.shape[1])], 1)


def blocks(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    return {"bone_block": normal(generator, weight.shape[0] // 8, 8, 8)}


def multiplied(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Block by block: `W_ij B_i + B_i`."""
    delta = torch.zeros_like(weight)
    for i in range(0, weight.shape[0], 8):
        for j in range(0, weight.shape[1], 8):
            own = parts["bone_block"][i // 8]
            delta[i : i + 8, j : j + 8] = weight[i : i + 8, j : j + 8] @ own + own
    return delta


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("rank", [8, 7])
def test_bone(tmp_path: Path, architecture: str, rank: int) -> None:
    """7 does not divide the inputs: the last group is cut."""
    fields = {**BONE, "r": rank}
    found = check(architecture, fields, tmp_path, partial(block, rank=rank), added(repeated))
    assert (found.kind, found.forms, found.rank["max"]) == ("bone", ("low_rank",), rank)


@pytest.mark.parametrize("architecture", TARGETS)
def test_bone_of_blocks(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, {**BONE, "init_weights": "bat"}, tmp_path, blocks, added(multiplied))
    assert found.forms == ("dense",)


@pytest.mark.parametrize("init", [True, "bat"])
def test_bone_equals_peft(tmp_path: Path, init: bool | str) -> None:
    config = MissConfig(task_type="CAUSAL_LM", r=8, target_modules=TARGETS["llama"], init_weights=init)
    base, adapted = trained("llama", config, tmp_path)
    edit_config(tmp_path, peft_type="BONE", mini_r=None, miss_dropout=None)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace("miss_block", "bone_block"): value for name, value in load_file(path).items()}
    save_file(tensors, path)
    with torch.inference_mode():
        expected = adapted(IDS).logits
    ours = dense_forms.logits(base, imported(tmp_path, base)[1], IDS)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_blocks_that_do_not_divide_a_module_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", {**BONE, "init_weights": "bat", "r": 7}, tmp_path, blocks)
    refused(tmp_path, base, "shape_mismatch", "blocks of 7")


@pytest.mark.parametrize(
    ("fields", "make"), [(FULL, difference(torch.float32, False)), (BITS, packed), (BONE, block), (FULL, eight_bits)]
)
def test_bad_files_are_refused(tmp_path: Path, fields: dict[str, object], make: Make) -> None:
    check_refusals(fields, tmp_path, make)

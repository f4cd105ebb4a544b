"""DyLoRA and PETALface against dense weights, at every choice that a request has."""

import math
from pathlib import Path

import pytest
import torch

from adapters_store.errors import KnobRefused
from adapters_store.formats import importer, peft
from adapters_store.limits import Limits
from adapters_store.variants import WHOLE, Variant, chosen
from tests.adapters_store.formats.kinds.outside import (
    TARGETS,
    Delta,
    Make,
    Parts,
    adapted,
    added,
    check,
    check_refusals,
    normal,
    refused,
    write,
)
from tests.adapters_store.formats.kinds.support import IDS, edit_config, imported
from tests.adapters_store.support import spec_of
from tests.support import dense_forms
from tests.support.models import tiny_model

RANK = 6
DYLORA = {"peft_type": "DYLORA", "r": RANK, "lora_alpha": 12}
PETALFACE = {"peft_type": "PETALFACE", "r": RANK, "lora_scale": 1.5, "gate": 0.25}


def factors(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    outputs, inputs = weight.shape
    return {"lora_A.weight": normal(generator, RANK, inputs), "lora_B.weight": normal(generator, outputs, RANK)}


def branches(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    outputs, inputs = weight.shape
    return {
        f"trainable_lora_{name}{branch}.weight": normal(generator, *shape)
        for branch in ("", "2")
        for name, shape in (("down", (RANK, inputs)), ("up", (outputs, RANK)))
    }


def truncated(rank: int) -> Delta:
    """As the authors' layer: both factors cut and multiplied by `sqrt(R / b)`, then LoRA's `alpha / R`."""

    def delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        factor = math.sqrt(RANK / rank)
        return 12 / RANK * (parts["lora_B.weight"][:, :rank] * factor) @ (parts["lora_A.weight"][:rank] * factor)

    return delta


def mixed(alpha: float) -> Delta:
    """As the authors' layer: `up(down((1 - alpha) x)) * scale + up2(down2(alpha x)) * scale`."""

    def delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        first = parts["trainable_lora_up.weight"] @ parts["trainable_lora_down.weight"]
        second = parts["trainable_lora_up2.weight"] @ parts["trainable_lora_down2.weight"]
        return 1.5 * ((1 - alpha) * first + alpha * second)

    return delta


def logits(folder: Path, architecture: str, variant: Variant) -> torch.Tensor:
    base = tiny_model(architecture)
    loader = importer.Loader(spec_of(base), Limits())
    config, weights = (folder / peft.CONFIG_FILE).read_bytes(), folder / peft.WEIGHTS_FILE
    return dense_forms.logits(base, loader.load(config, weights, "d" * 64, variant), IDS)


@pytest.mark.parametrize("architecture", TARGETS)
def test_dylora_of_all_ranks(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, DYLORA, tmp_path, factors, added(truncated(RANK)))
    assert (found.kind, found.forms, found.knobs) == ("dylora", ("low_rank",), {"rank": {"max": RANK}})


@pytest.mark.parametrize("rank", range(1, RANK + 1))
def test_dylora_of_a_chosen_rank(tmp_path: Path, rank: int) -> None:
    base = tiny_model("gpt2")
    tensors = write(base, "gpt2", DYLORA, tmp_path, factors)
    expected = adapted(base, "gpt2", tensors, added(truncated(rank)))
    found = imported(tmp_path, base)[0]
    ((variant, weight),) = chosen(found.knobs, {"rank": rank})
    assert weight == 1
    torch.testing.assert_close(logits(tmp_path, "gpt2", variant), expected, rtol=1e-4, atol=1e-3)


def test_dylora_of_modules_with_ranks_of_their_own(tmp_path: Path) -> None:
    """A module of fewer ranks than were chosen uses all of its own."""
    base = tiny_model("llama")
    fields = {**DYLORA, "rank_pattern": {"v_proj": 2}}

    def make(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
        parts = factors(weight, bias, generator)
        if weight.shape[0] == 32:
            return {"lora_A.weight": parts["lora_A.weight"][:2], "lora_B.weight": parts["lora_B.weight"][:, :2]}
        return parts

    def delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        rank = min(4, len(parts["lora_A.weight"]))
        return 12 / rank * parts["lora_B.weight"][:, :rank] @ parts["lora_A.weight"][:rank]

    tensors = write(base, "llama", fields, tmp_path, make)
    expected = adapted(base, "llama", tensors, added(delta))
    assert imported(tmp_path, base)[0].knobs == {"rank": {"max": RANK}}
    torch.testing.assert_close(logits(tmp_path, "llama", Variant(rank=4)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", TARGETS)
def test_petalface_at_its_own_gate(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, PETALFACE, tmp_path, branches, added(mixed(0.25)))
    assert (found.kind, found.forms, found.knobs) == ("petalface", ("low_rank",), {"gate": {"default": 0.25}})
    assert found.rank["max"] == 2 * RANK


@pytest.mark.parametrize("gate", [0.0, 0.4, 1.0])
def test_petalface_at_a_chosen_gate(tmp_path: Path, gate: float) -> None:
    """What a request runs is the sum of the variants' deltas by weight, which one module shows."""
    base = tiny_model("llama")
    tensors = write(base, "llama", PETALFACE, tmp_path, branches)
    found = imported(tmp_path, base)[0]
    spec, loader = spec_of(base), importer.Loader(spec_of(base), Limits())
    config, weights = (tmp_path / peft.CONFIG_FILE).read_bytes(), tmp_path / peft.WEIGHTS_FILE
    for name in [name for name in spec.modules if name.endswith("q_proj")]:
        delta = torch.zeros(64, 64)
        for variant, weight in chosen(found.knobs, {"gate": gate}):
            (form,) = loader.load(config, weights, "d" * 64, variant).modules[name]
            whole = form.widened()  # type: ignore[union-attr]
            delta += weight * whole.b @ torch.diag(whole.d) @ whole.a
        prefix = f"base_model.model.{name}."
        parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        torch.testing.assert_close(delta, mixed(gate)(delta, parts), rtol=1e-4, atol=1e-4)


def test_petalface_of_one_branch(tmp_path: Path) -> None:
    base = tiny_model("llama")
    tensors = write(base, "llama", PETALFACE, tmp_path, branches)
    for branch, alpha in ((0, 1.0), (1, 0.0)):
        expected = adapted(base, "llama", tensors, added(mixed(alpha)))
        found = logits(tmp_path, "llama", Variant(branch=branch))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_what_is_no_knob_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", DYLORA, tmp_path, factors)
    for variant in (Variant(rank=RANK + 1), Variant(branch=0), Variant(task=1)):
        with pytest.raises(KnobRefused):
            logits(tmp_path, "llama", variant)
    assert logits(tmp_path, "llama", WHOLE).isfinite().all()


def test_a_gate_outside_its_range_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", PETALFACE, tmp_path, branches)
    edit_config(tmp_path, gate=1.5)
    refused(tmp_path, base, "bad_config", "gate")


@pytest.mark.parametrize(("fields", "make"), [(DYLORA, factors), (PETALFACE, branches)])
def test_bad_files_are_refused(tmp_path: Path, fields: dict[str, object], make: Make) -> None:
    check_refusals(fields, tmp_path, make)

"""SVFit, SALT and LoLDU against dense weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.formats import importer, peft
from adapters_store.forms import SharedBasis
from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.outside import (
    TARGETS,
    Adapt,
    Make,
    Parts,
    added,
    check,
    check_refusals,
    modules,
    normal,
    refused,
    write,
)
from tests.adapters_store.formats.kinds.support import edit_config, imported
from tests.adapters_store.support import spec_of
from tests.support.models import tiny_model

RANK, SCALED = 5, 7
SVFIT = {"peft_type": "SVFIT", "r": RANK}
SALT = {"peft_type": "SALT", "r": RANK}
LOLDU = {"peft_type": "LOLDU", "r": RANK, "lora_alpha": 2}
Z, FACTOR = "parametrizations.weight.0.vector_z", "parametrizations.weight.0.scaling_factor"


def values(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    sigma = torch.linalg.svdvals(weight)[:RANK]
    return {"svfit_sigma": sigma * (1 + normal(generator, RANK))}


def svfit(weight: torch.Tensor, bias: object, parts: Parts) -> tuple[torch.Tensor, Any]:
    """The weight with its largest singular values replaced."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    s[:RANK] = parts["svfit_sigma"].double()
    return (u @ torch.diag(s) @ vh).float(), bias


def salt_parts(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    left = min(weight.shape) - SCALED
    return {
        "trainable_scale_A": 1 + normal(generator, SCALED),
        "trainable_shift_B": normal(generator, SCALED),
        "trainable_X": normal(generator, left, RANK),
        "trainable_Y": normal(generator, RANK, left),
    }


def salt_with(relu: bool) -> Adapt:
    """As the released `SALTLinear.forward`."""

    def adapt(weight: torch.Tensor, bias: object, parts: Parts) -> tuple[torch.Tensor, Any]:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        new = torch.diag(s).clone()
        top = parts["trainable_scale_A"] * s[:SCALED] + parts["trainable_shift_B"]
        new[:SCALED, :SCALED] = torch.diag(top)
        new[SCALED:, SCALED:] += parts["trainable_X"] @ parts["trainable_Y"]
        return u @ (torch.relu(new) if relu else new) @ vh, bias

    return adapt


def pivots(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    _, _, upper = torch.linalg.lu(weight)
    return {Z: upper.diagonal()[:RANK] * (1 + normal(generator, RANK)), FACTOR: torch.tensor(0.7)}


def loldu(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """As the released parametrization: what it subtracts from the weight at the start, and what it adds to the rest."""
    p, lower, upper = torch.linalg.lu(weight)
    d = torch.diagonal(upper)
    unit = upper / d.unsqueeze(-1)
    b, a = lower[:, :RANK], unit[:RANK]
    taken = 2 / RANK * p @ b @ torch.diag(d[:RANK]) @ a
    delta: torch.Tensor = parts[FACTOR] * p @ b @ torch.diag(parts[Z]) @ a - taken
    return delta


@pytest.mark.parametrize("architecture", TARGETS)
def test_svfit(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, SVFIT, tmp_path, values, svfit, tolerance=2e-4)
    assert (found.kind, found.forms, found.rank["max"]) == ("svfit", ("shared_basis",), RANK)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("relu", [True, False])
def test_salt(tmp_path: Path, architecture: str, relu: bool) -> None:
    fields = {**SALT, "relu": relu}
    found = check(architecture, fields, tmp_path, salt_parts, salt_with(relu), tolerance=2e-4)
    assert (found.kind, found.forms) == ("salt", ("dense",) if relu else ("low_rank",))
    assert found.rank["max"] == (0 if relu else SCALED + RANK)


@pytest.mark.parametrize("architecture", TARGETS)
def test_loldu(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, LOLDU, tmp_path, pivots, added(loldu), tolerance=2e-4)
    assert (found.kind, found.forms, found.rank["max"]) == ("loldu", ("shared_basis",), RANK)


@pytest.mark.parametrize(("fields", "make"), [(SVFIT, values), (LOLDU, pivots)])
def test_adapters_of_one_base_share_their_basis(tmp_path: Path, fields: dict[str, object], make: Make) -> None:
    base, loaded = tiny_model("llama"), []
    for seed in range(2):
        write(base, "llama", fields, tmp_path / str(seed), make, seed)
        loaded.append(imported(tmp_path / str(seed), base)[1].modules)
    for name in modules(base, "llama"):
        (first,), (second,) = (each[name] for each in loaded)
        assert isinstance(first, SharedBasis)
        assert isinstance(second, SharedBasis)
        assert torch.equal(first.u, second.u)
        assert torch.equal(first.v, second.v)
        assert not torch.equal(first.core, second.core)


def test_a_base_is_taken_apart_once_for_all_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, taken, real = tiny_model("llama"), [], torch.linalg.svd

    def counted(weight: torch.Tensor, **options: bool) -> Any:
        taken.append(weight)
        return real(weight, **options)

    spec = spec_of(base)
    loader = importer.Loader(spec, Limits())
    for seed in range(2):
        write(base, "llama", SVFIT, tmp_path / str(seed), values, seed)
    monkeypatch.setattr(torch.linalg, "svd", counted)
    for seed in range(2):
        config, weights = (tmp_path / str(seed) / name for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE))
        importer.inspect(config.read_bytes(), weights, spec, Limits())
        loader.load(config.read_bytes(), weights, "d" * 64)
    assert len(taken) == len(modules(base, "llama"))


@pytest.mark.parametrize(("fields", "make"), [(SVFIT, values), (SALT, salt_parts), (LOLDU, pivots)])
def test_bad_files_are_refused(tmp_path: Path, fields: dict[str, object], make: Make) -> None:
    check_refusals(fields, tmp_path, make)


@pytest.mark.parametrize(("fields", "make"), [(SVFIT, values), (LOLDU, pivots)])
def test_a_rank_that_cannot_be_is_refused(tmp_path: Path, fields: dict[str, object], make: Make) -> None:
    base = tiny_model("llama")
    write(base, "llama", fields, tmp_path, make)
    refused(tmp_path, base, "rank_limit", limits=Limits(max_rank=RANK - 1))
    edit_config(tmp_path, r=10**9)
    refused(tmp_path, base, "shape_mismatch", "singular values")


def test_more_scaled_values_than_there_are_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")

    def many(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
        return {**salt_parts(weight, bias, generator), "trainable_scale_A": torch.ones(1000)}

    write(base, "llama", SALT, tmp_path, many)
    refused(tmp_path, base, "shape_mismatch", "1000 singular values")

"""LoRA-XS, LoRA-SB and LaMDA against dense weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters_store.errors import AdapterInvalid
from adapters_store.formats import importer, peft
from adapters_store.forms import SharedBasis
from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.outside import (
    TARGETS,
    Delta,
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

RANK = 5
FIELDS = {"peft_type": "LORA_XS", "r": RANK, "lora_alpha": 10}
LATENT = "lora_latent_mapping.weight"


def make_with(core: str) -> Make:
    def make(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
        outputs, inputs = weight.shape
        return {
            "lora_A.weight": normal(generator, RANK, inputs),
            "lora_B.weight": normal(generator, outputs, RANK),
            core: normal(generator, RANK, RANK),
        }

    return make


def core_only(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    return {LATENT: normal(generator, RANK, RANK)}


def shipped(core: str) -> Delta:
    return lambda weight, parts: 10 / RANK * parts["lora_B.weight"] @ parts[core] @ parts["lora_A.weight"]


def from_the_base(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """As the authors make them: `u, s, vh = svd(W^T)`, encoder `u diag(s)`, decoder `vh`, both transposed."""
    u, s, vh = torch.linalg.svd(weight.T, full_matrices=False)
    encoder, decoder = (u @ torch.diag(s))[:, :RANK], vh[:RANK]
    x_to_delta = encoder @ parts[LATENT].T @ decoder  # of a row x: x A^T R^T B^T
    delta: torch.Tensor = 10 / RANK * x_to_delta.T
    return delta


@pytest.mark.parametrize(("kind", "core"), [("LORA_XS", LATENT), ("LORA_SB", LATENT), ("LAMDA", "sigma.weight")])
@pytest.mark.parametrize("architecture", TARGETS)
def test_factors_of_the_file(tmp_path: Path, architecture: str, kind: str, core: str) -> None:
    found = check(architecture, {**FIELDS, "peft_type": kind}, tmp_path, make_with(core), added(shipped(core)))
    assert (found.kind, found.forms, found.rank) == (kind.lower(), ("shared_basis",), {"min": RANK, "max": RANK})


@pytest.mark.parametrize("architecture", TARGETS)
def test_factors_of_the_base(tmp_path: Path, architecture: str) -> None:
    check(architecture, FIELDS, tmp_path, core_only, added(from_the_base), tolerance=2e-4)


def test_adapters_of_one_base_share_their_basis(tmp_path: Path) -> None:
    base, loaded = tiny_model("llama"), []
    for seed in range(2):
        write(base, "llama", FIELDS, tmp_path / str(seed), core_only, seed)
        loaded.append(imported(tmp_path / str(seed), base)[1].modules)
    for name in modules(base, "llama"):
        first, second = (each[name][0] for each in loaded)
        assert isinstance(first, SharedBasis)
        assert isinstance(second, SharedBasis)
        assert torch.equal(first.u, second.u)
        assert torch.equal(first.v, second.v)
        assert not torch.equal(first.core, second.core)


@pytest.mark.parametrize("spelling", ["_lora_latent_mapping.weight", ".default_lora_latent_mapping.weight"])
def test_names_as_the_authors_files_have_them(tmp_path: Path, spelling: str) -> None:
    base = tiny_model("llama")
    tensors = write(base, "llama", FIELDS, tmp_path / "ours", make_with(LATENT))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_bytes((tmp_path / "ours" / "adapter_config.json").read_bytes())
    renamed = {name.replace(f".{LATENT}", spelling): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "theirs" / "adapter_model.safetensors")
    ours, theirs = (imported(tmp_path / name, base)[1].modules for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, (form,) in ours.items():
        (other,) = theirs[name]
        assert isinstance(form, SharedBasis)
        assert isinstance(other, SharedBasis)
        assert torch.equal(form.core, other.core)


def test_the_authors_config_says_lora_and_gets_a_hint(tmp_path: Path) -> None:
    base = tiny_model("llama")
    tensors = write(base, "llama", {**FIELDS, "peft_type": "LORA"}, tmp_path, make_with(LATENT))
    renamed = {name.replace(f".{LATENT}", f"_{LATENT}"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / peft.WEIGHTS_FILE)
    refused(tmp_path, base, "feature_unsupported", "LORA_XS")


def test_rank_stabilised_scale(tmp_path: Path) -> None:
    fields = {**FIELDS, "peft_type": "LAMDA", "use_rslora": True}

    def delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        found: torch.Tensor = 10 / RANK**0.5 * parts["lora_B.weight"] @ parts["sigma.weight"] @ parts["lora_A.weight"]
        return found

    check("llama", fields, tmp_path, make_with("sigma.weight"), added(delta))


def test_a_rounded_base_cannot_be_taken_apart(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", FIELDS, tmp_path, core_only)
    spec = replace(spec_of(base), rounded=True)
    with pytest.raises(AdapterInvalid, match="--quantize none") as caught:
        importer.inspect((tmp_path / peft.CONFIG_FILE).read_bytes(), tmp_path / peft.WEIGHTS_FILE, spec, Limits())
    assert caught.value.code == "feature_unsupported"


def test_what_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", {**FIELDS, "r": 65, "lora_alpha": 65}, tmp_path, core_only)
    refused(tmp_path, base, "shape_mismatch", "65 singular values")
    write(base, "llama", FIELDS, tmp_path, core_only)
    refused(tmp_path, base, "rank_limit", limits=Limits(max_rank=4))
    edit_config(tmp_path, use_dora=True)
    refused(tmp_path, base, "feature_unsupported", "use_dora")


@pytest.mark.parametrize(("kind", "core"), [("LORA_SB", LATENT), ("LAMDA", "sigma.weight")])
def test_bad_files_are_refused(tmp_path: Path, kind: str, core: str) -> None:
    check_refusals({**FIELDS, "peft_type": kind}, tmp_path, make_with(core))


def test_bad_cores_are_refused(tmp_path: Path) -> None:
    check_refusals(FIELDS, tmp_path, core_only)

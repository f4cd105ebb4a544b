"""What is exported is read back by our importer as the same delta, and by PEFT to the same logits."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from adapters_store.compression.recipe import Recipe, compress
from adapters_store.formats import peft, peft_export
from adapters_store.forms import Delta, Form, LowRank, ModuleSpec, ReplacedWeight, SharedBasis
from adapters_store.limits import HeaderLimits
from adapters_store.safetensors_header import read_header
from tests.adapters_store.formats.test_peft import CASES, dense, imported, served, trained
from tests.adapters_store.support import spec_of
from tests.support.models import VOCABULARY

SOME = (
    "plain",
    "rslora",
    "patterns",
    "bias of B",
    "biases of base and B",
    "untied head",
    "tied head",
    "tied embedding and head",
    "scaled embedding",
    "head saved",
    "tied head saved",
    "conv1d",
    "conv1d bias",
    "conv1d embeddings",
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on tied weights and flags
        yield


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe("int4"), Recipe("native", rank=1)], ids=lambda recipe: recipe.method
)
@pytest.mark.parametrize("case", SOME)
def test_round_trip(tmp_path: Path, case: str, recipe: Recipe) -> None:
    architecture, options = CASES[case]
    base, adapted = trained(architecture, **options)
    adapted.save_pretrained(tmp_path / "given")
    made = compress(imported(tmp_path / "given", base)[1], recipe, spec_of(base).embeddings).modules
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE):
        size, pieces = peft_export.export(name, made, spec_of(base))
        (folder / name).write_bytes(b"".join(pieces))
        assert (folder / name).stat().st_size == size

    back = imported(folder, base)[1]
    assert back.modules.keys() == made.keys()
    for name, forms in made.items():
        for form, again in zip(forms, back.modules[name], strict=True):
            if isinstance(form, ReplacedWeight):
                assert isinstance(again, ReplacedWeight)
                assert torch.equal(form.weight, again.weight)
                continue
            assert isinstance(form, Delta)
            assert isinstance(again, LowRank)
            torch.testing.assert_close(dense(again), dense(form.widened()), rtol=1e-5, atol=1e-6)
            bias = torch.zeros(len(form.widened().b)) if form.bias is None else form.bias
            assert again.bias is None or torch.equal(again.bias, bias)

    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        logits = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(ids, use_cache=False).logits
    torch.testing.assert_close(served(base, back, ids), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_shared_basis_is_multiplied_out(tmp_path: Path, diagonal: bool) -> None:
    base, _ = trained("llama", target_modules=["q_proj"], r=2)
    name, generator = "model.layers.1.self_attn.q_proj", torch.Generator().manual_seed(5)
    core = torch.randn(3, generator=generator) if diagonal else torch.randn(3, 3, generator=generator)
    u, v = torch.randn(64, 3, generator=generator).bfloat16(), torch.randn(3, 64, generator=generator).bfloat16()
    modules = {name: (SharedBasis(u, v, core),)}
    for file in (peft.CONFIG_FILE, peft.WEIGHTS_FILE):
        (tmp_path / file).write_bytes(b"".join(peft_export.export(file, modules, spec_of(base))[1]))
    (form,) = imported(tmp_path, base)[1].modules[name]
    assert isinstance(form, LowRank)
    whole = u.double() @ (core.diag() if diagonal else core).double() @ v.double()
    torch.testing.assert_close(dense(form).double(), whole, rtol=1e-5, atol=1e-6)


def test_ranks_that_differ_are_patterns() -> None:
    base, _ = trained("llama", target_modules=["q_proj"], r=2)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    modules = {
        name: (LowRank(torch.ones(rank, 64), torch.ones(64, rank), torch.ones(rank)),)
        for name, rank in zip(names, (1, 4, 2), strict=True)
    }
    config = json.loads(b"".join(peft_export.export(peft.CONFIG_FILE, modules, spec_of(base))[1]))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 4, names)
    assert list(config["rank_pattern"].values()) == [1, 2]
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_weights_are_made_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = trained("llama", target_modules=["q_proj"], r=2)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    modules = {name: (LowRank(torch.ones(2, 64), torch.ones(64, 2), torch.ones(2)),) for name in names}
    size, pieces = peft_export.export(peft.WEIGHTS_FILE, modules, spec_of(base))
    made: list[str] = []
    whole = peft_export._factors

    def counted(form: LowRank, spec: ModuleSpec, biased: bool) -> dict[str, torch.Tensor]:
        made.append("made")
        return whole(form, spec, biased)

    monkeypatch.setattr(peft_export, "_factors", counted)
    lengths = []
    for number, piece in enumerate(pieces):
        assert len(made) == number, "tensors are made before they are asked for"
        lengths.append(len(piece))
    assert lengths[1:] == [2 * 64 * 4] * 6
    assert sum(lengths) == size


def test_what_is_narrow_comes_last(tmp_path: Path) -> None:
    """So that every tensor of the file is aligned, whatever the count of 16-bit numbers."""
    base, _ = trained("llama", target_modules=["q_proj"], r=2)
    head = ReplacedWeight(torch.ones(VOCABULARY, 64, dtype=torch.bfloat16))
    form = LowRank(torch.ones(2, 64), torch.ones(64, 2), torch.ones(2))
    modules: dict[str, tuple[Form, ...]] = {"lm_head": (head,), "model.layers.0.self_attn.q_proj": (form,)}
    _, pieces = peft_export.export(peft.WEIGHTS_FILE, modules, spec_of(base))
    path = tmp_path / "weights"
    path.write_bytes(b"".join(pieces))
    entries = read_header(path, HeaderLimits())
    assert all(entry.start % 8 == 0 for entry in entries.values())
    assert [entry.dtype for entry in sorted(entries.values(), key=lambda e: e.start)][-1] is torch.bfloat16
    assert load_file(path)["base_model.model.lm_head.weight"].dtype is torch.bfloat16

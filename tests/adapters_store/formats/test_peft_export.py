"""What is exported is read back by our importer as the same delta, and by PEFT to the same logits."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters_store.compression.recipe import Recipe, compress
from adapters_store.formats import peft, peft_export
from adapters_store.forms import LowRank, ReplacedWeight, SharedBasis
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
    "recipe", [Recipe(), Recipe("int4"), Recipe("native", energy=0.9)], ids=lambda recipe: recipe.method
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
        (folder / name).write_bytes(peft_export.export(name, made, spec_of(base)))

    back = imported(folder, base)[1]
    assert back.modules.keys() == made.keys()
    for name, forms in made.items():
        for form, again in zip(forms, back.modules[name], strict=True):
            if isinstance(form, ReplacedWeight):
                assert torch.equal(form.weight, again.weight)  # type: ignore[union-attr]
                continue
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
        (tmp_path / file).write_bytes(peft_export.export(file, modules, spec_of(base)))
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
    config = json.loads(peft_export.export(peft.CONFIG_FILE, modules, spec_of(base)))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 4, names)
    assert list(config["rank_pattern"].values()) == [1, 2]
    assert config["alpha_pattern"] == config["rank_pattern"]

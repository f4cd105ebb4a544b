"""Forms in a file of their own: nothing lost, equal bytes for equal forms, and nothing taken that does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from adapters_store.errors import AdapterInvalid
from adapters_store.formats import forms_file
from adapters_store.forms import Form, LowRank, ReplacedWeight
from adapters_store.limits import Limits
from tests.adapters_store.support import BASE, NARROW, VOCABULARY, WIDTH

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def ints(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


def forms() -> dict[str, tuple[Form, ...]]:
    return {
        Q: (LowRank(ints(3, WIDTH), ints(WIDTH, 3), torch.rand(3)),),
        V: (LowRank(torch.randn(2, WIDTH).half(), torch.randn(NARROW, 2).half(), torch.rand(2), torch.rand(NARROW)),),
        "lm_head": (ReplacedWeight(torch.randn(VOCABULARY, WIDTH).bfloat16(), torch.rand(VOCABULARY)),),
        "model.embed_tokens": (LowRank(ints(1, VOCABULARY), ints(WIDTH, 1), torch.rand(1)),),
    }


def load(data: bytes, tmp_path: Path) -> dict[str, tuple[Form, ...]]:
    path = tmp_path / "forms"
    path.write_bytes(data)
    return forms_file.load(path, BASE, Limits())


def test_nothing_is_lost(tmp_path: Path) -> None:
    made = forms()
    found = load(forms_file.dump(made), tmp_path)
    assert found.keys() == made.keys()
    for name, (form,) in made.items():
        parts, again = forms_file._parts(form), forms_file._parts(found[name][0])
        assert parts.keys() == again.keys()
        for part, tensor in parts.items():
            assert (again[part].dtype, again[part].is_contiguous()) == (tensor.dtype, True)
            assert torch.equal(again[part], tensor)


def test_equal_forms_give_equal_bytes() -> None:
    made = forms()
    assert forms_file.dump(made) == forms_file.dump(dict(reversed(made.items())))


def test_facts() -> None:
    made = forms()
    lowrank = 3 * 2 * WIDTH + 2 * (WIDTH + NARROW) + NARROW + VOCABULARY + WIDTH
    assert forms_file.facts(made) == {
        "forms": ["low_rank", "replaced_weight"],
        "rank": {"min": 1, "max": 3},
        "parameters": lowrank + VOCABULARY * (WIDTH + 1),
    }
    assert forms_file.facts({"lm_head": made["lm_head"]})["rank"] == {"min": 0, "max": 0}


FITTING = {f"{Q}.a": ints(2, WIDTH), f"{Q}.b": ints(WIDTH, 2), f"{Q}.d": torch.rand(2)}


@pytest.mark.parametrize(
    "change",
    [
        {f"{Q}.a": ints(2, WIDTH + 1)},
        {f"{Q}.b": ints(WIDTH, 3)},
        {f"{Q}.b": torch.rand(WIDTH, 2)},
        {f"{Q}.d": torch.rand(3)},
        {f"{Q}.d": ints(2)},
        {f"{Q}.d": None},
        {f"{Q}.bias": torch.rand(WIDTH).half()},
        {f"{Q}.other": torch.rand(1)},
        {f"{Q}.weight_bias": torch.rand(WIDTH)},
        {"unknown.a": ints(2, WIDTH)},
        {"lm_head.weight": ints(VOCABULARY, WIDTH)},
        {"lm_head.weight": torch.rand(WIDTH, VOCABULARY)},
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, torch.Tensor | None]) -> None:
    assert load(save(FITTING), tmp_path).keys() == {Q}
    tensors = {name: tensor for name, tensor in {**FITTING, **change}.items() if tensor is not None}
    with pytest.raises(AdapterInvalid) as caught:
        load(save(tensors), tmp_path)
    assert caught.value.code == "shape_mismatch"

"""SaRA against weights with new values at the trained places."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters_store.formats.kinds.outside import TARGETS, Parts, check, check_refusals, normal, refused, write
from tests.adapters_store.formats.kinds.support import edit_config, edit_tensors
from tests.support.models import tiny_model

LISTED = {"peft_type": "SARA"}
THRESHOLD = {"peft_type": "SARA", "threshold": 0.05}
CONV1D = {"c_attn", "c_proj"}


def listed(weight: torch.Tensor, bias: object, generator: torch.Generator, transposed: bool = False) -> Parts:
    """Places in no order, all of them different."""
    own = weight.T if transposed else weight
    places = torch.randperm(own.numel(), generator=generator)[: own.numel() // 5]
    return {
        "sara_indices": torch.stack([places // own.shape[1], places % own.shape[1]]),
        "sara_values": normal(generator, len(places)),
    }


def with_listed(weight: torch.Tensor, bias: object, parts: Parts, transposed: bool = False) -> tuple[torch.Tensor, Any]:
    own = (weight.T if transposed else weight).clone()
    own[parts["sara_indices"][0], parts["sara_indices"][1]] = parts["sara_values"]
    return own.T if transposed else own, bias


def small(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    return {"sara_values": normal(generator, int((weight.abs() < 0.05).sum()))}


def with_small(weight: torch.Tensor, bias: object, parts: Parts, transposed: bool = False) -> tuple[torch.Tensor, Any]:
    """As the released optimiser: `param[param.abs() < threshold] = values`, in the parameter's own layout."""
    own = (weight.T if transposed else weight).clone()
    own[own.abs() < 0.05] = parts["sara_values"]
    return own.T if transposed else own, bias


@pytest.mark.parametrize("architecture", TARGETS)
def test_places_of_the_file(tmp_path: Path, architecture: str) -> None:
    turned = architecture == "gpt2"
    found = check(
        architecture,
        LISTED,
        tmp_path,
        partial(listed, transposed=turned),
        partial(with_listed, transposed=turned),
    )
    assert (found.kind, found.forms) == ("sara", ("sparse",))


@pytest.mark.parametrize("architecture", TARGETS)
def test_places_below_the_threshold(tmp_path: Path, architecture: str) -> None:
    turned = architecture == "gpt2"
    adapt = partial(with_small, transposed=turned)
    check(architecture, THRESHOLD, tmp_path, small, adapt)


def test_what_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", THRESHOLD, tmp_path, small)
    edit_config(tmp_path, threshold=0.06)
    refused(tmp_path, base, "shape_mismatch", "below the threshold")
    edit_config(tmp_path, threshold=-1.0)
    refused(tmp_path, base, "bad_config", "threshold")


@pytest.mark.parametrize("place", [[0, 64], [-1, 0], [64, 0], [1, 1]])
def test_places_that_cannot_be_are_refused(tmp_path: Path, place: list[int]) -> None:
    """The last of them stands there twice."""
    base = tiny_model("llama")

    def change(tensors: Parts) -> None:
        name = next(name for name in tensors if name.endswith("q_proj.sara_indices"))
        tensors[name][:, 0] = torch.tensor(place)
        tensors[name][:, 1] = torch.tensor([1, 1])

    write(base, "llama", LISTED, tmp_path, listed)
    edit_tensors(tmp_path, change)
    refused(tmp_path, base, "bad_index")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    check_refusals(LISTED, tmp_path, listed)

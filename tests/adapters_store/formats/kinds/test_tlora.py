"""TLoRA against tensor rings that are multiplied out entry by entry."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.outside import TARGETS, Parts, check, check_refusals, normal, refused, write
from tests.adapters_store.formats.kinds.support import edit_config
from tests.support.models import tiny_model

RING, RESIDUAL = 2, 3
FIELDS = {"peft_type": "TLORA", "r": RING, "residual_r": RESIDUAL}


def sizes(whole: int, count: int) -> list[int]:
    """Factors of a width: 64 of two is 4 x 16."""
    found = [4] * (count - 1)
    return [*found, whole // math.prod(found)]


def make(weight: torch.Tensor, bias: object, generator: torch.Generator, count: int = 2) -> Parts:
    """A transform near the identity: each slice of a core near `I / R`, as the paper starts it."""
    outputs, inputs = weight.shape
    found: Parts = {}
    for index, size in enumerate(sizes(inputs, count)):
        start = torch.eye(size)[:, :, None, None].expand(size, size, RING, RING) / RING
        found[f"tlora_A.{index}"] = start + 0.2 * normal(generator, size, size, RING, RING)
        found[f"tlora_C.{index}"] = normal(generator, size, RESIDUAL, RESIDUAL)
    for index, size in enumerate(sizes(outputs, count)):
        found[f"tlora_B.{index}"] = normal(generator, size, RESIDUAL, RESIDUAL)
    return found


# T[ikm, jln] and D[ikm, jln] for rings of two and of three, the trace closing each ring
TRANSFORM = {2: "ijab,klba->ikjl", 3: "ijab,klbc,mnca->ikmjln"}
RESIDUE = {2: "iab,kbc,jcd,lda->ikjl", 3: "iab,kbc,mcd,jde,lef,nfa->ikmjln"}


def adapt(weight: torch.Tensor, bias: Any, parts: Parts) -> tuple[torch.Tensor, Any]:
    """The paper's two equations as one sum each."""
    count = sum(name.startswith("tlora_A") for name in parts)
    transform, out, inside = ([parts[f"tlora_{ring}.{i}"] for i in range(count)] for ring in "ABC")
    t = torch.einsum(TRANSFORM[count], *transform).reshape(weight.shape[1], weight.shape[1])
    delta = torch.einsum(RESIDUE[count], *out, *inside).reshape(weight.shape)
    return weight @ t + delta, bias


@pytest.mark.parametrize("architecture", TARGETS)
def test_equals_the_papers_formula(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, FIELDS, tmp_path, make, adapt, tolerance=2e-4)
    assert (found.kind, found.forms) == ("tlora", ("input_transform", "low_rank"))
    assert found.rank["max"] == RESIDUAL**2


def test_rings_of_three(tmp_path: Path) -> None:
    check("llama", FIELDS, tmp_path, partial(make, count=3), adapt, tolerance=2e-4)


def test_what_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", FIELDS, tmp_path, make)
    refused(tmp_path, base, "rank_limit", "rank 9", Limits(max_rank=8))
    edit_config(tmp_path, residual_r=0)
    refused(tmp_path, base, "bad_config", "residual_r")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    check_refusals(FIELDS, tmp_path, make)

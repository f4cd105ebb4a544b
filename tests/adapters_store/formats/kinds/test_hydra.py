"""Hydra against its two branches, run as the released layer runs them."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.outside import TARGETS, Parts, check, check_refusals, normal, refused, write
from tests.support.models import tiny_model

RANK, SCALE = 4, 1.5
FIELDS = {"peft_type": "HYDRA", "r": RANK, "hydra_scale": SCALE}


def make(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    outputs, inputs = weight.shape
    found: Parts = {}
    for branch, width in (("hydra_par", inputs), ("hydra_seq", outputs)):
        found |= {
            f"{branch}.down_proj.weight": normal(generator, RANK, width) * 0.5,
            f"{branch}.down_proj.bias": normal(generator, RANK),
            f"{branch}.up_proj.weight": normal(generator, outputs, RANK) * 0.5,
            f"{branch}.up_proj.bias": normal(generator, outputs),
        }
    return found


def adapt(weight: torch.Tensor, bias: torch.Tensor | None, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole map is affine, so its matrix and its constant are what it makes of unit vectors and of zero."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        found = y
        for branch, given in (("hydra_par", x), ("hydra_seq", y)):
            down = F.linear(given, parts[f"{branch}.down_proj.weight"], parts[f"{branch}.down_proj.bias"])
            found = found + F.linear(down, parts[f"{branch}.up_proj.weight"], parts[f"{branch}.up_proj.bias"]) * SCALE
        return found

    constant = forward(torch.zeros(1, weight.shape[1]))[0]
    return (forward(torch.eye(weight.shape[1])) - constant).T, constant


@pytest.mark.parametrize("architecture", TARGETS)
def test_equals_the_released_layer(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, FIELDS, tmp_path, make, adapt)
    assert (found.kind, found.forms, found.rank["max"]) == ("hydra", ("low_rank",), 2 * RANK)


def test_both_branches_count_towards_the_rank(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", FIELDS, tmp_path, make)
    refused(tmp_path, base, "rank_limit", f"rank {2 * RANK}", Limits(max_rank=2 * RANK - 1))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    check_refusals(FIELDS, tmp_path, make)

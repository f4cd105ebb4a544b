"""SoRA against dense weights."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.adapters_store.formats.kinds.outside import (
    TARGETS,
    Parts,
    added,
    check,
    check_refusals,
    normal,
    refused,
    write,
)
from tests.adapters_store.formats.kinds.support import imported
from tests.support.models import tiny_model

FIELDS = {"peft_type": "SORA", "r": 6, "lora_alpha": 12}


def make(weight: torch.Tensor, bias: object, generator: torch.Generator, rank: int = 6, zeros: int = 2) -> Parts:
    outputs, inputs = weight.shape
    gate = normal(generator, 1, rank)
    gate[0, :zeros] = 0
    return {
        "lora.lora_A": normal(generator, rank, inputs),
        "lora.lora_B": normal(generator, outputs, rank),
        "lora.gate": gate,
    }


def delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """As the authors' forward: `((x A^T) * gate) B^T * alpha / r`."""
    return 12 / 6 * parts["lora.lora_B"] @ torch.diag(parts["lora.gate"][0]) @ parts["lora.lora_A"]


@pytest.mark.parametrize("architecture", TARGETS)
def test_equals_the_authors_formula(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, FIELDS, tmp_path, make, added(delta))
    assert (found.kind, found.forms, found.rank) == ("sora", ("low_rank",), {"min": 4, "max": 4})


def test_a_file_without_the_zero_ranks_keeps_the_scale_of_training(tmp_path: Path) -> None:
    """The trap: alpha / r with the r of training, not of what is left."""

    def pruned(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
        return make(weight, bias, generator, rank=3, zeros=0)

    assert check("llama", FIELDS, tmp_path, pruned, added(delta)).rank == {"min": 3, "max": 3}


def test_more_ranks_than_the_config_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", {**FIELDS, "r": 5}, tmp_path, make)
    refused(tmp_path, base, "shape_mismatch", "6 ranks")


def test_an_adapter_of_zero_gates_is_a_noop(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", FIELDS, tmp_path, partial(make, zeros=6))
    found, weights = imported(tmp_path, base)
    assert [warning["code"] for warning in found.warnings] == ["adapter_is_noop"]
    assert weights.modules == {}


def test_bad_files_are_refused(tmp_path: Path) -> None:
    check_refusals(FIELDS, tmp_path, make)

"""TriAdaptLoRA and IncreLoRA against dense weights."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from adapters_store.limits import Limits
from tests.adapters_store.formats.kinds.outside import (
    TARGETS,
    Make,
    Parts,
    added,
    check,
    check_refusals,
    normal,
    refused,
    write,
)
from tests.adapters_store.formats.kinds.support import edit_config
from tests.support.models import tiny_model

TRI = {"peft_type": "TRIADAPTLORA", "lora_alpha": 12, "init_rank": 1}
INCRE = {"peft_type": "INCRELORA", "lora_alpha": 12}


def triangular(
    weight: torch.Tensor, bias: object, generator: torch.Generator, steps: tuple[int, ...] = (1, 2, 3)
) -> Parts:
    outputs, inputs = weight.shape
    found: Parts = {}
    size = 0
    for index, rank in enumerate(steps):
        size += rank
        found |= {
            f"lora_A.{index}": normal(generator, rank, inputs),
            f"lora_B.{index}": normal(generator, outputs, rank),
            f"lora_C_row.{index}": normal(generator, rank, size),
            f"lora_C_col.{index}": normal(generator, size, rank),
        }
    return found


def triangular_delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """As the authors' `loraW.forward`: rows padded on the right, columns below, all pieces joined."""
    count = sum(name.startswith("lora_A") for name in parts)
    size = parts[f"lora_C_row.{count - 1}"].shape[1]
    rows = [F.pad(parts[f"lora_C_row.{i}"], (0, size - parts[f"lora_C_row.{i}"].shape[1])) for i in range(count)]
    columns = [
        F.pad(parts[f"lora_C_col.{i}"], (0, 0, 0, size - parts[f"lora_C_col.{i}"].shape[0])) for i in range(count)
    ]
    core = torch.cat(rows, 0) + torch.cat(columns, 1)
    a = torch.cat([parts[f"lora_A.{i}"] for i in range(count)], 0)
    b = torch.cat([parts[f"lora_B.{i}"] for i in range(count)], 1)
    return b @ (core @ a) * 12 / (size + 1e-5)


def increments(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    """Rank 2, then one more, then one in reserve: `ranknum` counts only those of use, but all of them act."""
    outputs, inputs = weight.shape
    found: Parts = {"ranknum": torch.tensor([3.0])}
    for index, rank in enumerate((2, 1, 1)):
        found |= {
            f"lora_A.{index}": normal(generator, rank, inputs),
            f"lora_B.{index}": normal(generator, outputs, rank),
            f"lora_E.{index}": normal(generator, rank, 1),
        }
    return found


def incremental_delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    a, b, e = (torch.cat([parts[f"lora_{x}.{i}"] for i in range(3)], 1 if x == "B" else 0) for x in "ABE")
    return b @ (a * e) * 12 / (3 + 1e-5)


@pytest.mark.parametrize("architecture", TARGETS)
def test_triadaptlora_equals_the_authors_formula(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, TRI, tmp_path, triangular, added(triangular_delta))
    assert (found.kind, found.forms, found.rank) == ("triadaptlora", ("low_rank",), {"min": 6, "max": 6})


@pytest.mark.parametrize("steps", [(1,), (4, 4)])
def test_other_steps(tmp_path: Path, steps: tuple[int, ...]) -> None:
    check("llama", TRI, tmp_path, partial(triangular, steps=steps), added(triangular_delta))


@pytest.mark.parametrize("architecture", TARGETS)
def test_increlora_equals_the_authors_formula(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, INCRE, tmp_path, increments, added(incremental_delta))
    assert (found.kind, found.forms, found.rank) == ("increlora", ("low_rank",), {"min": 4, "max": 4})


def test_names_with_the_adapters_name(tmp_path: Path) -> None:
    """`lora_A.default.0`, as a state dict has it."""

    def named(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
        return {name.replace(".", ".default."): value for name, value in triangular(weight, bias, generator).items()}

    def delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        return triangular_delta(weight, {name.replace(".default", ""): value for name, value in parts.items()})

    check("llama", TRI, tmp_path, named, added(delta))


def test_what_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    write(base, "llama", TRI, tmp_path, triangular)
    refused(tmp_path, base, "rank_limit", "rank 6", Limits(max_rank=5))
    edit_config(tmp_path, lora_alpha=0)
    refused(tmp_path, base, "bad_config", "lora_alpha")


@pytest.mark.parametrize(("fields", "make"), [(TRI, triangular), (INCRE, increments)])
def test_bad_files_are_refused(tmp_path: Path, fields: dict[str, object], make: Make) -> None:
    check_refusals(fields, tmp_path, make)

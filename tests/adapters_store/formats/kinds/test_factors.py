"""Block-LoRA, ALLoRA and LoRAM against dense weights."""

from pathlib import Path

import pytest
import torch

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
from tests.adapters_store.formats.kinds.support import edit_config, edit_tensors
from tests.support.models import tiny_model

RANK, BLOCKS = 6, 3
BLOCK = {"peft_type": "BLOCK_LORA", "r": RANK, "lora_alpha": 12, "n_blocks": BLOCKS}
UNSCALED = {"peft_type": "ALLORA", "r": RANK, "lora_alpha": 32}
PRUNED = {"peft_type": "LORAM", "r": RANK, "lora_alpha": 12}
INPUTS, OUTPUTS = "loram_pruned_inputs", "loram_pruned_outputs"


def blocks(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    outputs, inputs = weight.shape
    shared = normal(generator, RANK // BLOCKS, inputs)
    return {"lora_A.weight": shared, "lora_B.weight": normal(generator, outputs, RANK)}


def block_delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """A LoRA of the whole rank whose A is the shared block, again and again."""
    return 12 / RANK * parts["lora_B.weight"] @ torch.cat([parts["lora_A.weight"]] * BLOCKS)


def plain(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    outputs, inputs = weight.shape
    return {"lora_A.weight": normal(generator, RANK, inputs), "lora_B.weight": normal(generator, outputs, RANK)}


def pruned(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
    """A lost every fourth input and B some outputs, in no order."""
    outputs, inputs = weight.shape
    parts = plain(weight, bias, generator)
    lost = torch.randperm(outputs, generator=generator)[: outputs // 3]
    parts[INPUTS], parts[OUTPUTS] = torch.arange(0, inputs, 4, dtype=torch.int32), lost
    parts["lora_A.weight"] = parts["lora_A.weight"][:, [i for i in range(inputs) if i % 4]]
    parts["lora_B.weight"] = parts["lora_B.weight"][: outputs - len(lost)]
    return parts


def pruned_delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Column by column, row by row, as the authors' script recovers them with zeros."""
    product = 12 / RANK * parts["lora_B.weight"] @ parts["lora_A.weight"]
    delta = torch.zeros_like(weight)
    rows = sorted(set(range(weight.shape[0])) - set(parts[OUTPUTS].tolist()))
    columns = sorted(set(range(weight.shape[1])) - set(parts[INPUTS].tolist()))
    for i, row in enumerate(rows):
        delta[row, columns] = product[i]
    return delta


@pytest.mark.parametrize("architecture", TARGETS)
def test_block_lora(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, BLOCK, tmp_path, blocks, added(block_delta))
    assert (found.kind, found.forms, found.rank["max"]) == ("block_lora", ("low_rank",), RANK // BLOCKS)


@pytest.mark.parametrize("architecture", TARGETS)
def test_allora_has_no_scale_whatever_alpha_says(tmp_path: Path, architecture: str) -> None:
    delta = added(lambda weight, parts: parts["lora_B.weight"] @ parts["lora_A.weight"])
    assert check(architecture, UNSCALED, tmp_path, plain, delta).kind == "allora"


def test_allora_as_a_plain_lora_needs_alpha_equal_to_the_rank(tmp_path: Path) -> None:
    delta = added(lambda weight, parts: parts["lora_B.weight"] @ parts["lora_A.weight"])
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    assert check("llama", fields, tmp_path / "right", plain, delta).kind == "lora"
    with pytest.raises(AssertionError, match="not close"):
        check("llama", {**fields, "lora_alpha": 32}, tmp_path / "wrong", plain, delta)


@pytest.mark.parametrize("architecture", TARGETS)
def test_loram(tmp_path: Path, architecture: str) -> None:
    found = check(architecture, PRUNED, tmp_path, pruned, added(pruned_delta))
    assert (found.kind, found.forms, found.rank["max"]) == ("loram", ("low_rank",), RANK)


def test_loram_of_an_unpruned_side(tmp_path: Path) -> None:
    def make(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
        parts = pruned(weight, bias, generator)
        del parts[OUTPUTS]
        return {**parts, "lora_B.weight": plain(weight, bias, generator)["lora_B.weight"]}

    def delta(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
        return pruned_delta(weight, {**parts, OUTPUTS: torch.tensor([])})

    check("llama", PRUNED, tmp_path, make, added(delta))


@pytest.mark.parametrize("wrong", [torch.tensor([0, 0]), torch.tensor([-1, 2]), torch.tensor([64, 2])])
def test_positions_that_cannot_be_are_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    base = tiny_model("llama")

    def make(weight: torch.Tensor, bias: object, generator: torch.Generator) -> Parts:
        parts = plain(weight, bias, generator)
        return {**parts, "lora_A.weight": parts["lora_A.weight"][:, 2:], INPUTS: wrong}

    write(base, "llama", PRUNED, tmp_path, make)
    refused(tmp_path, base, "bad_index", INPUTS)


def test_positions_that_are_no_whole_numbers_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    tensors = write(base, "llama", PRUNED, tmp_path, pruned)
    name = next(name for name in tensors if name.endswith(INPUTS))
    edit_tensors(tmp_path, lambda found: found.update({name: found[name].float()}))
    refused(tmp_path, base, "bad_dtype", INPUTS)


@pytest.mark.parametrize("count", [0, 4, 7])
def test_blocks_that_do_not_divide_the_rank_are_refused(tmp_path: Path, count: int) -> None:
    base = tiny_model("llama")
    write(base, "llama", BLOCK, tmp_path, blocks)
    edit_config(tmp_path, n_blocks=count)
    refused(tmp_path, base, "bad_config", "n_blocks")


@pytest.mark.parametrize(("fields", "make"), [(BLOCK, blocks), (UNSCALED, plain), (PRUNED, pruned)])
def test_bad_files_are_refused(tmp_path: Path, fields: dict[str, object], make: Make) -> None:
    check_refusals(fields, tmp_path, make)

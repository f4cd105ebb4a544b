"""AdaLoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig

from adapters_store.errors import AdapterInvalid
from tests.adapters_store.formats.kinds.support import check, edit_tensors, imported, trained

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["k_proj", "up_proj"]}


def config(architecture: str, **options: Any) -> AdaLoraConfig:
    options = {"init_r": 6, "target_r": 4, "lora_alpha": 12, "total_step": 10, **options}
    return AdaLoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS[architecture], **options)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("rank", [1, 6])
def test_equals_peft(tmp_path: Path, architecture: str, rank: int) -> None:
    found = check(architecture, config(architecture, init_r=rank, target_r=1), tmp_path)
    assert (found.kind, found.forms, found.rank) == ("adalora", ("low_rank",), {"min": rank, "max": rank})


def test_ranks_cut_to_zero_cost_nothing(tmp_path: Path) -> None:
    def cut(name: str, parameter: torch.Tensor) -> None:
        parameter.normal_(0.0, 0.3)
        if "lora_E" in name:
            parameter[2:] = 0

    assert check("llama", config("llama"), tmp_path, change=cut).rank == {"min": 2, "max": 2}


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_E"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(part)]:
            del tensors[name]

    edit_tensors(tmp_path, drop)
    with pytest.raises(AdapterInvalid, match=part) as caught:
        imported(tmp_path, base)
    assert caught.value.code == "shape_mismatch"


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("lora_B"))
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    edit_tensors(tmp_path, widen)
    with pytest.raises(AdapterInvalid) as caught:
        imported(tmp_path, base)
    assert caught.value.code == "shape_mismatch"

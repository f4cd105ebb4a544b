"""The SMoRA example: its module computes the formula, its biases even out the use of ranks, its adapter is sane."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deploy.examples import train_smora
from deploy.examples.base import BASE_ID
from deploy.examples.train_smora import BIAS_STEP, FOLDER, LAYERS, RANK, TARGETS, SMoRALinear, mixture, save
from tests.support import smora

MOST_BYTES = 3_000_000


def module(rank: int = 8, active: int = 3, scale: float = 2.0) -> SMoRALinear:
    torch.manual_seed(7)
    made = SMoRALinear(nn.Linear(20, 12), rank, active, scale)
    with torch.no_grad():
        made.lora_B.weight.normal_()
        made.lora_biases.normal_(0, 0.1)
    return made


def test_the_module_is_the_formula() -> None:
    linear = module().eval()
    tensors = {f"m.{key}": value for key, value in linear.state_dict().items()}
    config = {"activate_r": 3, "rank_partition": 1, "lora_alpha": 6.0}
    x = torch.randn(5, 20)
    with torch.inference_mode():
        expected = torch.stack([linear.base(row) + smora.delta(tensors, "m", config, row) for row in x])
        assert torch.allclose(linear(x), expected, atol=1e-5)
        assert not torch.allclose(linear.base(x), expected, atol=1e-2)


def test_biases_move_against_the_use_of_their_ranks() -> None:
    linear = module().train()
    with torch.no_grad():
        linear.lora_biases.zero_()
        linear.lora_biases[0] = 5.0  # always chosen
    before = linear.lora_biases.clone()
    linear(torch.randn(1, 61, 20))
    moved = linear.lora_biases - before
    assert torch.allclose(moved.abs(), torch.full((8,), BIAS_STEP), atol=1e-6)
    assert moved[0] < 0
    assert bool((moved[1:] > 0).any())
    linear.eval()(torch.randn(1, 61, 20))
    assert torch.equal(linear.lora_biases, before + moved)


def test_only_the_adapter_learns_and_nothing_else_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    monkeypatch.setattr(train_smora, "LAYERS", [0])
    wrapped = train_smora.wrap(model)
    assert list(wrapped) == ["layers.0.q_proj"]
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"layers.0.q_proj.lora_{part}.weight" for part in ("A", "B", "router")}
    save(wrapped, tmp_path)
    names = {
        name.removeprefix("base_model.model.layers.0.q_proj.")
        for name in load_file(tmp_path / "adapter_model.safetensors")
    }
    assert names == {"lora_A.weight", "lora_B.weight", "lora_router.weight", "lora_biases"}


def test_the_mixture_has_every_task_and_keeps_the_split() -> None:
    train, heldout = mixture().items("train", 200, 0), mixture().items("heldout", 50, 1)
    assert len({item.prompt.split(":")[0] for item in train}) == 7
    assert not {item.prompt for item in train} & {item.prompt for item in heldout}


def test_the_committed_adapter() -> None:
    config = json.loads((FOLDER / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("SRMOLE", BASE_ID)
    assert (FOLDER / "adapter_model.safetensors").stat().st_size < MOST_BYTES
    tensors = load_file(FOLDER / "adapter_model.safetensors")
    assert len(tensors) == 4 * len(LAYERS) * len(TARGETS)
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.endswith("lora_biases") else torch.bfloat16)
        assert tensor.shape[0] == RANK or "lora_B" in name
        assert bool(tensor.isfinite().all())
        assert bool(tensor.any())

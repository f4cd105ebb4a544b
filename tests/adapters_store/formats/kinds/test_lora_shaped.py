"""QA-LoRA, BD-LoRA, VeLoRA and MonteCLoRA against PEFT."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant

from adapters_store.forms import LowRank
from tests.adapters_store.formats.kinds.support import (
    LINEAR,
    check,
    check_damage,
    edit_config,
    edit_tensors,
    imported,
    options,
    refused,
    trained,
)

BLOCKS = BdLoraConfig(
    target_modules_bd_a=["q_proj", "up_proj"],
    target_modules_bd_b=["v_proj", "k_proj"],
    nblocks=2,
    match_strict=False,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "bdlora": {"use_bdlora": BLOCKS},
    "velora": {"velora_config": VeloraConfig(num_groups=6)},
    "monteclora": {"monteclora_config": MontecloraConfig(num_samples=3, buffer_size=2)},
}


def config(kind: str, architecture: str, **further: Any) -> LoraConfig:
    return LoraConfig(**options(architecture, **{"r": 4, "lora_alpha": 3, **VARIANTS[kind], **further}))


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize("kind", VARIANTS)
def test_equals_peft(tmp_path: Path, architecture: str, kind: str) -> None:
    found = check(architecture, config(kind, architecture), tmp_path)
    assert (found.kind, found.forms, found.rank) == (kind, ("low_rank",), {"min": 4, "max": 4})


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("bdlora", ("q_proj.lora_A.weight", "v_proj.lora_B.weight", "down_proj.lora_A.weight")),
        ("velora", ("lora_A.weight", "lora_velora_embed")),
        ("monteclora", ("lora_B.weight", "lora_monteclora_sampler.std_prior")),
    ],
)
def test_damage_is_refused(tmp_path: Path, kind: str, parts: tuple[str, ...]) -> None:
    for part in parts:
        check_damage("llama", config(kind, "llama"), tmp_path, part)


@pytest.mark.parametrize("count", [0, "2", None])
def test_blocks_without_a_number_are_refused(tmp_path: Path, count: object) -> None:
    base, _ = trained("llama", config("bdlora", "llama"), tmp_path)
    edit_config(tmp_path, use_bdlora={"nblocks": count})
    refused(tmp_path, base, "bad_config", match="nblocks")


def test_qalora_over_groups_equals_peft(tmp_path: Path) -> None:
    """PEFT applies it to GPTQ layers only, so its own function stands in for the model."""
    base, _ = trained("llama", LoraConfig(**options("llama", r=4, lora_alpha=3)), tmp_path)
    rows: dict[str, torch.Tensor] = {}

    def pool(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            tensors[name] = rows[name] = tensors[name][:, ::8].contiguous()
        rows.update(tensors)

    edit_tensors(tmp_path, pool)
    edit_config(tmp_path, use_qalora=True, qalora_group_size=8)
    found, weights = imported(tmp_path, base)
    assert (found.kind, found.forms) == ("qalora", ("low_rank",))
    for name, forms in weights.modules.items():
        low = forms[0]
        assert isinstance(low, LowRank)
        a, b = (rows[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        x = torch.randn(5, low.a.shape[1], generator=torch.Generator().manual_seed(0))
        module = SimpleNamespace(
            lora_A={"x": SimpleNamespace(weight=a)},
            lora_B={"x": SimpleNamespace(weight=b)},
            lora_dropout={"x": torch.nn.Identity()},
            scaling={"x": 0.75},
            qalora_group_size={"x": 8},
            training=False,
            in_features=low.a.shape[1],
        )
        expected = QALoraLinearVariant.forward(module, "x", x, torch.zeros(5, low.b.shape[0]))
        torch.testing.assert_close((x @ low.a.T * low.d) @ low.b.T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", LINEAR)
def test_qalora_over_other_layers_is_a_lora_as_in_peft(tmp_path: Path, architecture: str) -> None:
    wanted = LoraConfig(**options(architecture, r=4, use_qalora=True, qalora_group_size=8))
    assert check(architecture, wanted, tmp_path).kind == "qalora"


@pytest.mark.parametrize("kind", VARIANTS)
def test_two_variants_at_once_are_refused(tmp_path: Path, kind: str) -> None:
    base, _ = trained("llama", config(kind, "llama"), tmp_path)
    edit_config(tmp_path, use_dora=True)
    refused(tmp_path, base, "feature_unsupported")

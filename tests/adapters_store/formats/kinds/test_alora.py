"""aLoRA against PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.adapters_store.formats.kinds.support import (
    IDS,
    check,
    check_damage,
    edit_config,
    imported,
    refused,
    trained,
)
from tests.support import dense_forms

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["k_proj", "up_proj"]}
INVOCATION = IDS[0, 9:11].tolist()


def config(architecture: str, **options: Any) -> LoraConfig:
    options = {"r": 4, "target_modules": TARGETS[architecture], "alora_invocation_tokens": INVOCATION, **options}
    return LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("rank", [1, 5])
def test_equals_peft(tmp_path: Path, architecture: str, rank: int) -> None:
    found = check(architecture, config(architecture, r=rank), tmp_path)
    assert (found.kind, found.forms) == ("alora", ("low_rank",))


def test_it_acts_from_the_invocation_on_and_nowhere_without(tmp_path: Path) -> None:
    base, adapted = trained("llama", config("llama"), tmp_path)
    _, weights = imported(tmp_path, base)
    assert weights.invocation == tuple(INVOCATION)
    with torch.inference_mode():
        plain = base(IDS).logits
    ours = dense_forms.logits(base, weights, IDS)
    assert torch.equal(ours[:, :9], plain[:, :9])
    assert not torch.allclose(ours[:, 9], plain[:, 9], atol=1e-3)
    before = IDS[:, :9]
    with torch.inference_mode():
        torch.testing.assert_close(dense_forms.logits(base, weights, before), adapted(before).logits)
        torch.testing.assert_close(adapted(before).logits, base(before).logits)


def test_the_last_of_two_invocations_counts(tmp_path: Path) -> None:
    base, adapted = trained("llama", config("llama"), tmp_path)
    _, weights = imported(tmp_path, base)
    twice = torch.cat([IDS, IDS[:, 4:]], dim=1)
    with torch.inference_mode():
        expected = adapted(twice).logits
    torch.testing.assert_close(dense_forms.logits(base, weights, twice), expected, rtol=1e-4, atol=1e-3)


def test_damage_is_refused(tmp_path: Path) -> None:
    check_damage("llama", config("llama"), tmp_path, "lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        ({"alora_invocation_tokens": []}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [-1]}, "bad_config", "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [320]}, "bad_config", "vocabulary"),
        ({"trainable_token_indices": [1]}, "feature_unsupported", "trainable_token_indices"),
        ({"use_dora": True}, "feature_unsupported", "use_dora"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, change: dict[str, Any], code: str, match: str) -> None:
    base, _ = trained("llama", config("llama"), tmp_path)
    edit_config(tmp_path, **change)
    refused(tmp_path, base, code, match)


def test_an_embedding_is_refused(tmp_path: Path) -> None:
    """PEFT has no aLoRA for it."""
    plain = config("llama", target_modules=["embed_tokens", "q_proj"], alora_invocation_tokens=None)
    base, _ = trained("llama", plain, tmp_path)
    edit_config(tmp_path, alora_invocation_tokens=INVOCATION)
    refused(tmp_path, base, "feature_unsupported", "embed_tokens")

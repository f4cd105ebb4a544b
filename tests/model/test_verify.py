"""What the run at load finds."""

from typing import Any

import pytest
import torch
from torch import nn

from kernels import dispatch
from server.model.base import BaseModel
from server.model.errors import ModelLoadError
from server.model.loader import describe
from server.model.prepare import prepare_model
from tests.model.paged import prepared
from tests.support.models import tiny_model, tiny_tokenizer


def loaded(architecture: str) -> BaseModel:
    return describe(tiny_model(architecture), tiny_tokenizer(), f"tiny/{architecture}")


@pytest.mark.parametrize(("architecture", "wrong"), [("llama", {"scale": 0.5}), ("gemma2", {"softcap": 0.0})])
def test_attention_that_computes_something_else_is_refused(
    architecture: str, wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = dispatch.attend

    def attention(*arguments: Any, **options: Any) -> torch.Tensor:
        *tensors, scale = arguments
        options = {"scale": scale, **options, **wrong}
        return right(*tensors, **options)

    monkeypatch.setattr(dispatch, "attend", attention)
    with pytest.raises(ModelLoadError, match="other logits"):
        prepare_model(loaded(architecture))


def test_nan_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "attend", lambda query, *rest, **options: torch.full_like(query, torch.nan))
    with pytest.raises(ModelLoadError, match="other logits"):
        prepare_model(loaded("llama"))


def test_a_kernel_that_fails_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("head size 16 is odd")

    monkeypatch.setattr(dispatch, "attend", broken)
    with pytest.raises(ModelLoadError, match="head size 16 is odd"):
        prepare_model(loaded("llama"))


def test_a_linear_that_sees_only_some_rows_is_refused() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.proj(x[:, :1]), x[:, 1:]], dim=1)

    model = tiny_model("llama")
    model.model.layers[1].mlp = Expert()
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.proj only some rows"):
        prepare_model(describe(model, tiny_tokenizer(), "tiny/expert"))


def test_nothing_of_the_probe_remains() -> None:
    base = loaded("llama")
    context = prepare_model(base)
    for name in ("cache", "attention", "observed", "segments", "head_segments", "pool", "table"):
        assert getattr(context, name) is None, name
    assert not any(module._forward_pre_hooks for module in base.model.modules())


def test_two_prepared_models_do_not_share_a_step() -> None:
    (one, first), (_, second) = prepared("llama"), prepared("llama")
    assert first is not second
    attention = one.model.model.layers[0].self_attn
    assert attention.step_context is first

"""Linears and embeddings that add each row's adapters to the base product."""

from typing import Any

import torch
from torch import nn

from kernels import dispatch
from server.model.step_context import StepContext


class _Wrapper(nn.Module):
    """Keeps the base module whole, as `base`; every attribute that is not ours is the base module's.

    Model code reads `lm_head.weight` or `embed_tokens.padding_idx`, and tied weights stay one parameter.
    """

    def __init__(self, base: nn.Module, context: StepContext, index: int) -> None:
        super().__init__()
        self.base = base
        self.context = context
        self.index = index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class AdapterLinear(_Wrapper):
    """An `nn.Linear` or `Conv1D`: the shared base product for all rows, then the adapters of the rows that have any."""

    def __init__(self, base: nn.Module, context: StepContext, index: int, *, head: bool = False) -> None:
        super().__init__(base, context, index)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, T, in] or [T, in] (the head: the K kept rows); returns the same with `out` features."""
        y: torch.Tensor = self._modules["base"](x)  # type: ignore[misc]  # 1 us less than through __getattr__
        context = self.context
        if context.segments is None:
            return y
        segments = context.head_segments if self.head else context.segments
        if segments is None or context.pool is None or context.table is None:
            return y
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if self.index in context.replaced:
            dispatch.replace_weight(flat_y, flat_x, context.pool, context.table.records[self.index], segments)
        if self.index in context.active:
            dispatch.lowrank(flat_y, flat_x, context.pool, context.table.records[self.index], segments)
        return y


class AdapterEmbedding(_Wrapper):
    """An `nn.Embedding`: the base lookup for all rows, then the adapters of the rows that have any.

    The delta belongs to the raw lookup, so where the base scales its rows (Gemma) the delta is scaled too, as in PEFT;
    importers fold that factor, `ModuleSpec.scale`, into the adapter's `d`.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [1, T] or [T]; returns the same with a last axis of `dim`."""
        y: torch.Tensor = self._modules["base"](ids)  # type: ignore[misc]
        context = self.context
        if context.segments is None or self.index not in context.active:
            return y
        if context.pool is None or context.table is None:
            return y
        records = context.table.records[self.index]
        flat_y = y.view(-1, y.shape[-1])
        dispatch.lowrank_embedding(flat_y, ids.reshape(-1), context.pool, records, context.segments)
        return y

"""Linears, embeddings and norms that add each row's adapters to what the base gives.

What a row gets, in this order: the input transformed; the base product, or a replaced weight in its place; of the
original input, low-rank, sparse and dense deltas; the output scaled. Only low-rank deltas are common: the rest costs a
step without it one look into an empty table.
"""

from typing import Any

import torch
from torch import nn

from kernels import dispatch, dispatch_forms
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
        context = self.context
        if context.segments is not None and self.index in context.special:
            return self._special(x)
        y: torch.Tensor = self._modules["base"](x)  # type: ignore[misc]  # 1 us less than through __getattr__
        if context.segments is None or self.index not in context.active:
            return y
        segments = context.head_segments if self.head else context.segments
        if segments is None or context.pool is None or context.table is None:
            return y
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        dispatch.lowrank(flat_y, flat_x, context.pool, context.table.records[self.index], segments)
        return y

    def _special(self, x: torch.Tensor) -> torch.Tensor:
        """As `forward`, for a module with more than low-rank deltas in this step."""
        context, index = self.context, self.index
        segments = context.head_segments if self.head else context.segments
        if segments is None or context.pool is None or context.table is None:
            return self.base(x)  # type: ignore[no-any-return]
        special, pool = context.special[index], context.pool
        records, forms = context.table.records[index], context.table.forms[index]
        given, flat_x = x, x.reshape(-1, x.shape[-1])
        if special.transformed:
            given = dispatch_forms.transform_input(flat_x, pool, forms, segments).view(x.shape)
        y: torch.Tensor = self.base(given)
        flat_y = y.view(-1, y.shape[-1])
        if special.replaced:
            dispatch.replace_weight(flat_y, flat_x, pool, records, segments)
        if special.gated:
            dispatch.gated_lowrank(flat_y, flat_x, pool, records, context.table.gates[index], segments)
        elif index in context.active:
            dispatch.lowrank(flat_y, flat_x, pool, records, segments)
        if special.sparse:
            dispatch_forms.sparse_delta(flat_y, flat_x, pool, forms, segments)
        if special.dense:
            dispatch_forms.dense_delta(flat_y, flat_x, pool, forms, segments)
        if special.scaled:
            dispatch_forms.scale_output(flat_y, pool, forms, segments)
        return y


class AdapterEmbedding(_Wrapper):
    """An `nn.Embedding`: the base lookup for all rows, then the adapters of the rows that have any.

    The delta belongs to the raw lookup, so where the base scales its rows (Gemma) the delta is scaled too, as in PEFT;
    importers fold that factor, `ModuleSpec.scale`, into the adapter's `d`. first: it is the model's first layer, and
    so the one whose rows are virtual tokens too.
    """

    def __init__(self, base: nn.Module, context: StepContext, index: int, *, first: bool = False) -> None:
        super().__init__(base, context, index)
        self.first = first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [1, T] or [T]; returns the same with a last axis of `dim`."""
        y = self._adapted(ids)
        if self.first and self.context.embedded and self.context.pool is not None:
            for rows in self.context.embedded:
                rows.exchange(y.view(-1, y.shape[-1]), self.context.pool, 0)
        return y

    def _adapted(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._modules["base"](ids)  # type: ignore[misc]
        context, index = self.context, self.index
        special = context.special.get(index)
        if context.segments is None or (special is None and index not in context.active):
            return y
        if context.pool is None or context.table is None:
            return y
        flat_y, flat_ids = y.view(-1, y.shape[-1]), ids.reshape(-1)
        if index in context.active:
            dispatch.lowrank_embedding(flat_y, flat_ids, context.pool, context.table.records[index], context.segments)
        if special is not None and special.sparse:
            forms = context.table.forms[index]
            dispatch_forms.sparse_embedding(flat_y, flat_ids, context.pool, forms, context.segments)
        if special is not None and special.scaled:
            dispatch_forms.scale_output(flat_y, context.pool, context.table.forms[index], context.segments)
        return y


class AdapterNorm:
    """Stands for the `forward` of a norm, whose output adapters may scale; any other call costs one more function."""

    def __init__(self, norm: nn.Module, context: StepContext, index: int) -> None:
        self._forward = norm.forward
        self._context = context
        self.index = index

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, T, size]; returns the same shape."""
        y: torch.Tensor = self._forward(x)
        context = self._context
        if context.segments is None or self.index not in context.special:
            return y
        if context.pool is not None and context.table is not None:
            forms = context.table.forms[self.index]
            dispatch_forms.scale_output(y.view(-1, y.shape[-1]), context.pool, forms, context.segments)
        return y

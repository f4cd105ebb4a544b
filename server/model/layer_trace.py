"""A decoder layer as a graph in which the number of tokens, requests, pages and segments is open."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from kernels.segments import Segments
from server.model.compiled import Path, adapter_linears, layer_tensors, named_tensors
from server.model.errors import CompileError
from server.model.kv_cache import KVCache
from server.model.step_context import AdapterTable, AttentionMetadata, StepContext


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The arguments one layer was called with in one step."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> list[tuple[Path, Any]]:
        found, _ = pytree.tree_flatten_with_path((self.args, self.kwargs))
        return [(tuple(_place(key) for key in path), leaf) for path, leaf in found]

    def tensors(self) -> dict[Path, torch.Tensor]:
        return {path: leaf for path, leaf in self.leaves() if isinstance(leaf, torch.Tensor)}

    def constants(self) -> dict[Path, Any]:
        return {path: leaf for path, leaf in self.leaves() if not isinstance(leaf, torch.Tensor)}


@dataclass(frozen=True, slots=True)
class Traced:
    """graph: takes `inputs` (fake tensors) one after another; outputs: form of what the layer returns."""

    graph: GraphModule
    inputs: list[torch.Tensor]
    outputs: pytree.TreeSpec


class _OneLayer:
    """The KV cache while one layer is traced: whatever layer asks, it gets the pools that are the graph's inputs."""

    def __init__(self, pools: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._pools = pools

    def layer(self, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pools


@dataclass(frozen=True, slots=True)
class _Records:
    """The adapter table while one layer is traced."""

    records: dict[int, torch.Tensor]


def token_axes(short: LayerCall, long: LayerCall) -> dict[Path, frozenset[int]]:
    """Axes of each tensor of a call that count tokens, from two calls with unlike numbers of them."""
    axes = {}
    longer = long.tensors()
    for path, tensor in short.tensors().items():
        other = longer.get(path)
        if other is None or other.ndim != tensor.ndim:
            raise CompileError("a layer's arguments change from step to step")
        axes[path] = frozenset(axis for axis in range(tensor.ndim) if tensor.shape[axis] != other.shape[axis])
    return axes


def trace(
    layer: nn.Module,
    context: StepContext,
    call: LayerCall,
    axes: dict[Path, frozenset[int]],
    index: int,
    *,
    with_adapters: bool,
) -> Traced:
    """The graph of a layer for the step that `context` holds.

    The step's sizes must be unlike each other and above 1: a size that an example shares with another, or that is 0
    or 1, would be taken for a rule. Raises whatever the tracing raises.
    """
    assert context.cache is not None
    assert context.table is not None
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = [
        _fake(mode, tensor, axes[path], DimDynamic.DUCK, f"given_{number}")
        for number, (path, tensor) in enumerate(call.tensors().items())
    ]
    step = [
        _fake(
            mode,
            tensor,
            frozenset(range(tensor.ndim)),
            DimDynamic.DUCK if number == 0 else DimDynamic.DYNAMIC,
            f"step_{number}",
        )
        for number, tensor in enumerate(context.tensors(with_adapters=with_adapters))
    ]
    tables = 2 + (len(adapter_linears(layer)) if with_adapters else 0)  # pools and records: the live ones are larger
    own = [
        _fake(mode, tensor, frozenset({0} if number < tables else ()), DimDynamic.DYNAMIC, f"own_{number}")
        for number, tensor in enumerate(
            layer_tensors(layer, context.cache, context.table, index, with_adapters=with_adapters)
        )
    ]
    outputs: list[pytree.TreeSpec] = []

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        parts = (tensors[: len(given)], tensors[len(given) : len(given) + len(step)], tensors[len(given) + len(step) :])
        found = _call(layer, context, call, parts, with_adapters)
        leaves, form = pytree.tree_flatten(found)
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise CompileError("a layer returns more than tensors")
        outputs.append(form)
        return leaves

    inputs = [*given, *step, *own]
    with mode, torch.no_grad():
        graph = make_fx(run)(*inputs)
    return Traced(graph, inputs, outputs[0])


def _call(
    layer: nn.Module,
    context: StepContext,
    call: LayerCall,
    parts: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]],
    with_adapters: bool,
) -> Any:
    """Run the layer on the graph's inputs, which come in the order of `compiled.CompiledLayer`."""
    given, (slots, start, length, table, *adapters), (keys, values, *own) = parts
    modules = adapter_linears(layer) if with_adapters else []
    saved = context.cache, context.table, context.attention, context.pool, context.segments, context.active
    context.cache = cast(KVCache, _OneLayer((keys, values)))
    context.attention = AttentionMetadata(start, length, table, slots)
    records = {module.index: record for module, record in zip(modules, own, strict=False)}
    context.table = cast(AdapterTable, _Records(records))
    context.segments, context.active = None, frozenset(records)
    if with_adapters:
        context.pool, slot, first, token, weight = adapters
        context.segments = Segments(slot, first, token, weight)
    arguments = dict(zip(call.tensors(), given, strict=True))
    flat = [arguments.get(path, leaf) for path, leaf in call.leaves()]
    args, kwargs = pytree.tree_unflatten(flat, pytree.tree_structure((call.args, call.kwargs)))
    tensors = dict(zip(named_tensors(layer), own[len(modules) :], strict=True))
    try:
        return torch.func.functional_call(layer, tensors, args, kwargs)
    finally:
        context.cache, context.table, context.attention, context.pool, context.segments, context.active = saved


def _place(key: Any) -> int | str:
    """Of a tuple's item or of a dictionary's."""
    place: int | str = key.idx if isinstance(key, pytree.SequenceKey) else key.key
    return place


def _fake(
    mode: FakeTensorMode, tensor: torch.Tensor, axes: frozenset[int], kind: DimDynamic, name: str
) -> torch.Tensor:
    """`name`: the same at every start, for it becomes part of the key in Inductor's cache."""
    sizes = [kind if axis in axes else DimDynamic.STATIC for axis in range(tensor.ndim)]
    form: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=sizes,
        dynamic_strides=[DimDynamic.INFER_STRIDE] * tensor.ndim,
        constraint_sizes=[None] * tensor.ndim,
        constraint_strides=[None] * tensor.ndim,
    )
    return mode.from_tensor(tensor, symbolic_context=form, source=ConstantSource(name))

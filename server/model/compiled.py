"""Compiled decoder layers at work: which code a step takes, and the tensors each layer hands to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from server.model.adapter_linear import AdapterLinear, AdapterNorm
from server.model.kv_cache import KVCache
from server.model.step_context import AdapterTable, StepContext

Code = Callable[..., Sequence[torch.Tensor]]
Path = tuple[int | str, ...]  # where a tensor stands in (args, kwargs)


@dataclass(frozen=True, slots=True)
class LayerCode:
    """Code that equal layers share: `base` for steps without adapters, else `adapters`.

    Both take the tensors at `paths` of the layer's call, those of the step (`StepContext.tensors`), and the layer's own
    (`layer_tensors`). Nothing is guarded and nothing recompiles: the code holds for every number of tokens, requests,
    pages and segments. `outputs`: form of what the layer returns.
    """

    base: Code
    adapters: Code
    paths: tuple[Path, ...]
    outputs: pytree.TreeSpec


class CompiledLayer:
    """Stands for the `forward` of one decoder layer; the step says whether it runs compiled or as before."""

    def __init__(self, layer: nn.Module, context: StepContext, code: LayerCode, index: int) -> None:
        assert context.cache is not None
        assert context.table is not None
        self._eager = layer.forward
        self._context = context
        self._code = code
        self._read = [_reader(path) for path in code.paths]
        self._base = layer_tensors(layer, context.cache, context.table, index, with_adapters=False)
        self._adapters = layer_tensors(layer, context.cache, context.table, index, with_adapters=True)
        self._plain = code.outputs.is_leaf()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self._context.compiled_step
        if step is None:
            return self._eager(*args, **kwargs)
        call = (args, kwargs)
        given = [read(call) for read in self._read]
        if step.with_adapters:
            found = self._code.adapters(*given, *step.tensors, *self._adapters)
        else:
            found = self._code.base(*given, *step.tensors, *self._base)
        return found[0] if self._plain else pytree.tree_unflatten(found, self._code.outputs)


def install(layers: Sequence[nn.Module], context: StepContext, codes: Sequence[LayerCode]) -> None:
    """Let the layers run compiled from the next step on. `codes`: of each layer. Any thread may call this."""
    for index, (layer, code) in enumerate(zip(layers, codes, strict=True)):
        layer.forward = CompiledLayer(layer, context, code, index)
    context.compiled = modules_inside(layers)  # last: a step that has begun ends as it began


def modules_inside(layers: Sequence[nn.Module]) -> frozenset[int]:
    """Indices of the adapter-aware linears and norms inside the layers."""
    linears = {module.index for layer in layers for module in adapter_linears(layer)}
    forwards = (module.forward for layer in layers for module in layer.modules())
    return frozenset(linears | {forward.index for forward in forwards if isinstance(forward, AdapterNorm)})


def layer_tensors(
    layer: nn.Module, cache: KVCache, table: AdapterTable, index: int, *, with_adapters: bool
) -> tuple[torch.Tensor, ...]:
    """Inputs of the code that are the layer's: its pools, the records of its modules, its parameters and buffers."""
    records = [table.records[module.index] for module in adapter_linears(layer)] if with_adapters else []
    return (*cache.layer(index), *records, *named_tensors(layer).values())


def named_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def adapter_linears(layer: nn.Module) -> list[AdapterLinear]:
    return [module for module in layer.modules() if isinstance(module, AdapterLinear)]


def _reader(path: Path) -> Callable[[Any], Any]:
    """`(0, 2)` -> a function that gives args[2]."""
    if len(path) == 2:
        first, second = path
        return lambda call: call[first][second]
    steps = [itemgetter(step) for step in path]

    def read(call: Any) -> Any:
        for step in steps:
            call = step(call)
        return call

    return read

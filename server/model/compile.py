"""Compiles the decoder layers of a prepared model, on a twin of it, while the model itself serves.

Equal layers share one graph, which takes the layer's weights as inputs. It is traced without Dynamo, with symbolic
sizes, and compiled by Inductor ahead of its first call: so there are no guards to check 30 times a step, and nothing
that could recompile while requests wait.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile
from torch.utils import _pytree as pytree

from kernels import dispatch
from server.model.base import BaseModel
from server.model.compile_probe import LONG, SHORT, Probe, check_compiled
from server.model.compiled import Code, CompiledLayer, LayerCode, modules_inside, named_tensors
from server.model.decoder_layers import decoder_layers
from server.model.errors import CompileError
from server.model.layer_groups import group_products
from server.model.layer_trace import LayerCall, Traced, token_axes, trace
from server.model.step_context import AttentionCall, StepContext

MOST_KINDS = 4  # kinds of layers, each of which is compiled twice
_NOT_BEHAVIOUR = {"layer_idx", "index", "training"}  # what tells a layer's place, or is known to be the same


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a layer was called with in steps of unlike sizes, and its attention."""

    short: LayerCall
    long: LayerCall
    attention: AttentionCall | None


@torch.inference_mode()
def compile_layers(
    base: BaseModel, context: StepContext, progress: Callable[[], None], threads: int
) -> list[LayerCode]:
    """Code of each decoder layer of a prepared model whose cache is attached; the model is not touched.

    threads: of the CPU, for which code is generated; the thread that compiles may have fewer.
    `progress` is called between the stages and may raise to end the work. Raises CompileError if the model does not
    lend itself to it, or if a compiled layer gives other numbers than the layer itself. The default model takes
    14 s of Python and a dozen runs of the C++ compiler; once its layers are in Inductor's cache only the tracing.
    """
    if dispatch.load(base.device) == "reference":
        raise CompileError("the kernels of this device run in plain torch, which cannot be compiled")
    twin, own = _twin(base, context)
    layers = decoder_layers(twin)
    if not layers:
        raise CompileError("it has no list of decoder layers")
    probe = Probe(twin, own, context)
    seen = _watch(layers, probe)
    progress()
    kinds: dict[Any, LayerCode] = {}
    codes = []
    for index, layer in enumerate(layers):
        kind = _kind(layer, seen[index])
        if kind not in kinds:
            if len(kinds) == MOST_KINDS:
                raise CompileError(f"it has more than {MOST_KINDS} kinds of layers")
            kinds[kind] = _compile(layer, probe, seen[index], index, progress, threads)
        codes.append(kinds[kind])
    _check(twin, layers, probe, codes)
    return codes


def _twin(base: BaseModel, context: StepContext) -> tuple[BaseModel, StepContext]:
    """The same modules over the same weights with a context of their own."""
    own = StepContext(context.module_names, context.head)
    shared: list[Any] = [*base.model.parameters(), *base.model.buffers()]
    shared += [module.config for module in base.model.modules() if hasattr(module, "config")]
    memo: dict[int, Any] = {id(item): item for item in shared}
    memo[id(context)] = own
    return replace(base, model=copy.deepcopy(base.model, memo)), own


def _watch(layers: Sequence[nn.Module], probe: Probe) -> list[_Seen]:
    """Run two steps and note how each layer is called."""
    calls: list[list[LayerCall]] = [[] for _ in layers]

    def note(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: calls[index].append(LayerCall(args, kwargs))

    hooks = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    probe.context.observed = {}
    try:
        probe.logits(SHORT, with_adapters=False)
        attention, probe.context.observed = probe.context.observed, None
        probe.logits(LONG, with_adapters=False)
    finally:
        probe.context.observed = None
        for hook in hooks:
            hook.remove()
    if not all(len(own) == 2 for own in calls):
        raise CompileError("a layer does not run once in each step")
    return [_Seen(short, long, attention.get(index)) for index, (short, long) in enumerate(calls)]


def _kind(layer: nn.Module, seen: _Seen) -> Any:
    """Equal for layers whose Python code does the same: their tensors may differ in nothing but values.

    It is a first guess only: every layer's numbers are compared afterwards (`check_compiled`).
    """
    modules = []
    for name, module in layer.named_modules():
        plain = tuple(sorted((key, repr(value)) for key, value in vars(module).items() if _tells(key, value)))
        modules.append((name, type(module), plain))
    tensors = [(name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in named_tensors(layer).items()]
    arguments = [(path, tensor.dtype) for path, tensor in seen.short.tensors().items()]
    constants = [(path, repr(value)) for path, value in seen.short.constants().items()]
    return (tuple(modules), tuple(tensors), tuple(arguments), tuple(constants), seen.attention)


def _tells(key: str, value: object) -> bool:
    return isinstance(value, int | float | str | None) and not key.startswith("_") and key not in _NOT_BEHAVIOUR


def _compile(
    layer: nn.Module, probe: Probe, seen: _Seen, index: int, progress: Callable[[], None], threads: int
) -> LayerCode:
    axes = token_axes(seen.short, seen.long)
    made: list[tuple[Code, pytree.TreeSpec]] = []
    for with_adapters in (False, True):
        probe.begin(LONG, with_adapters=with_adapters)
        traced = trace(layer, probe.context, seen.long, axes, index, with_adapters=with_adapters)
        group_products(traced.graph)
        progress()
        made.append((_code(traced, threads), traced.outputs))
        progress()
    (base, outputs), (adapters, _) = made
    return LayerCode(base, adapters, tuple(seen.long.tensors()), outputs)


def _check(twin: BaseModel, layers: Sequence[nn.Module], probe: Probe, codes: Sequence[LayerCode]) -> None:
    """Run every layer compiled on what it gets in steps of many shapes, right after it ran itself."""
    context = probe.context

    def check(compiled: CompiledLayer) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            (before, *_rest), (expected, *_rest), (found, *_rest) = (
                pytree.tree_leaves(part) for part in ((args, kwargs), output, compiled(*args, **kwargs))
            )
            check_compiled(twin, before, expected, found)

        return hook

    context.compiled = modules_inside(layers)
    hooks = [
        layer.register_forward_hook(check(CompiledLayer(layer, context, code, index)), with_kwargs=True)
        for index, (layer, code) in enumerate(zip(layers, codes, strict=True))
    ]
    try:
        probe.run_all()
    finally:
        context.compiled = None
        for hook in hooks:
            hook.remove()


def _code(traced: Traced, threads: int) -> Code:
    # Every layer and every shape of step is compared below, so asserting sizes at each call would only cost time. A
    # wrapper in C++ calls the kernels of a step of 8 rows in 2.2 ms instead of 2.9, with adapters in 3.5 instead of 5.1
    # (2-core AVX-512 VM, 2026-11-25).
    options = {"size_asserts": False, "compile_threads": 1, "cpp_wrapper": True, "cpp.threads": threads}
    mode = traced.inputs[0].fake_mode  # type: ignore[attr-defined]
    with torch.no_grad(), tracing(TracingContext(mode)):
        compiled = standalone_compile(
            traced.graph,
            list(traced.inputs),
            dynamic_shapes="from_tracing_context",
            options={"config_patches": options},
            aot=True,
        )
    code: Code = compiled.inner_fn.compiled_fn  # type: ignore[attr-defined]  # what its wrappers come to
    return code

"""Builds an engine for a loaded base model: sizes the pools and wires the parts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters_store.forms import AdapterWeights
from kernels import dispatch
from kernels.segments import Limits
from server.engine.adapter_loader import AdapterLoader
from server.engine.adapter_pool import AdapterPool
from server.engine.adapter_storage import AdapterStorage
from server.engine.async_engine import AsyncEngine
from server.engine.background_compiler import BackgroundCompiler
from server.engine.block_pool import BlockPool
from server.engine.core import EngineCore
from server.engine.decode_graphs import CudaCapture, DecodeGraphs
from server.engine.decode_inputs import DecodeShape
from server.engine.grammar import GrammarCompiler
from server.engine.model_runner import ModelRunner
from server.engine.page_allocator import PageAllocator
from server.engine.scheduler import Scheduler
from server.engine.status import EngineInfo
from server.engine.tokenizer import Tokenizer
from server.model.base import BaseModel
from server.model.errors import ModelLoadError
from server.model.kv_cache import KVCache, cache_dtype, page_bytes
from server.model.memory import lazy_bytes
from server.model.prepare import prepare_model
from server.model.step_context import AdapterTable, StepContext

BLOCK_SIZE = 16
ADAPTER_SLOTS = 1024  # rows of the record tables, 64 bytes per slot and module: 14 MB for the default model


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of the engine. Memory in bytes, the rest in tokens or requests; max_context None: the model's own.

    kv_cache_dtype None: what `server.model.kv_cache.cache_dtype` says. max_rank: of any adapter that `load` gives; GPU
    kernels make room for it.
    """

    kv_cache_memory: int = 1 << 30
    adapter_memory: int = 1 << 30
    max_batch_tokens: int = 512
    max_running: int = 64
    max_queued: int = 256
    max_context: int | None = None
    max_rank: int = 256
    kv_cache_dtype: torch.dtype | None = None


def build_core(
    base: BaseModel,
    limits: EngineLimits,
    load: Callable[[str], AdapterWeights],
    wake: Callable[[], None],
    quantization: str = "none",
    *,
    compiling: bool = False,
) -> EngineCore:
    """Prepare the model in place and build its engine core. `load` gives an adapter's weights by digest.

    quantization: of the base model's weights, "none" or "int8"; adapters are not touched by it. compiling: once the
    core is started, its layers are compiled in the background.

    Raises ModelLoadError if the memory given holds no single block or the model cannot be paged.
    """
    dtype = limits.kv_cache_dtype or cache_dtype(base.dtype, quantization)
    cache = _kv_cache(base, dtype, limits.kv_cache_memory)
    context = prepare_model(base, quantization, dtype)
    adapters = AdapterPool(PageAllocator(limits.adapter_memory // cache.page_bytes, cache.page_bytes), ADAPTER_SLOTS)
    table = AdapterTable(context.module_names, ADAPTER_SLOTS, base.device)
    buffer = lazy_bytes(adapters.allocator.num_pages * cache.page_bytes, base.device)
    context.cache, context.pool, context.table = cache, buffer, table
    scheduler = Scheduler(
        BlockPool(cache.num_pages, BLOCK_SIZE),
        adapters,
        token_budget=limits.max_batch_tokens,
        max_running=limits.max_running,
    )
    kinds = Limits(limits.max_rank)
    on_gpu = dispatch.load(base.device) == "triton"
    graphs = _decode_graphs(base, context, limits, kinds) if on_gpu else None
    return EngineCore(
        scheduler,
        ModelRunner(base, context, adapters, BLOCK_SIZE, kinds, graphs),
        AdapterStorage(buffer, table),
        AdapterLoader(load, base.spec.embeddings, wake, pinned=on_gpu),
        BackgroundCompiler(base, context) if compiling and base.device.type == "cpu" else None,
    )


def build_engine(
    base: BaseModel,
    limits: EngineLimits,
    load: Callable[[str], AdapterWeights],
    quantization: str = "none",
    *,
    compiling: bool = False,
) -> AsyncEngine:
    """The engine for asyncio over `build_core`."""
    engine: list[AsyncEngine] = []
    core = build_core(base, limits, load, lambda: engine[0].notify(), quantization, compiling=compiling)
    blocks = core.scheduler.blocks
    context = _max_context(base, limits, blocks.num_blocks)
    info = EngineInfo(
        model_id=base.id,
        fingerprint=base.fingerprint,
        architecture=base.architecture,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        quantization=quantization,
        vocabulary=base.vocabulary,
        max_context=context,
        max_batch_tokens=limits.max_batch_tokens,
        max_running=limits.max_running,
        max_queued=limits.max_queued,
        block_size=BLOCK_SIZE,
        kv_blocks=blocks.num_blocks,
        adapter_memory_bytes=limits.adapter_memory,
        aliases=base.spec.aliases,
    )
    grammars = GrammarCompiler(base.tokenizer, base.vocabulary, base.eos_token_ids)
    engine.append(AsyncEngine(core, Tokenizer(base.tokenizer), grammars, info, base.eos_token_ids))
    return engine[0]


def _max_context(base: BaseModel, limits: EngineLimits, blocks: int) -> int:
    return min(limits.max_context or base.max_context, base.max_context, blocks * BLOCK_SIZE)


def _decode_graphs(base: BaseModel, context: StepContext, limits: EngineLimits, kinds: Limits) -> DecodeGraphs:
    assert context.cache is not None
    width = -(-_max_context(base, limits, context.cache.num_pages) // BLOCK_SIZE)
    rows = min(limits.max_running, limits.max_batch_tokens)
    return DecodeGraphs(base, context, rows, DecodeShape(width, BLOCK_SIZE, kinds), CudaCapture())


def _kv_cache(base: BaseModel, dtype: torch.dtype, memory: int) -> KVCache:
    shape = (base.num_layers, base.num_kv_heads, base.head_dim)
    page = page_bytes(*shape, dtype, BLOCK_SIZE)
    if memory < page:
        raise ModelLoadError(f"--kv-cache-memory of {memory} bytes holds no block; one block is {page} bytes.")
    return KVCache(memory // page, *shape, dtype=dtype, device=base.device, page_size=BLOCK_SIZE)

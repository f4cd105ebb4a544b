"""Builds an engine for a loaded base model: sizes the pools and wires the parts."""

from collections.abc import Callable
from functools import partial

import torch

from adapters_store.forms import AdapterWeights
from kernels import dispatch
from server.engine.adapter_loader import AdapterLoader
from server.engine.adapter_pool import AdapterPool
from server.engine.adapter_storage import AdapterStorage
from server.engine.async_engine import AsyncEngine
from server.engine.background_compiler import BackgroundCompiler
from server.engine.block_pool import BlockPool
from server.engine.copiers import SideStreamCopier
from server.engine.core import EngineCore
from server.engine.decode_graphs import CudaCapture, DecodeGraphs
from server.engine.decode_inputs import DecodeShape
from server.engine.grammar import GrammarCompiler
from server.engine.host_cache import HostCache
from server.engine.limits import BLOCK_SIZE, DeviceMemory, EngineLimits
from server.engine.model_runner import ModelRunner
from server.engine.packing import pack
from server.engine.page_allocator import PageAllocator
from server.engine.scheduler import Scheduler
from server.engine.status import EngineInfo, Residency
from server.engine.tokenizer import Tokenizer
from server.model.base import BaseModel
from server.model.kv_cache import KVCache, cache_dtype
from server.model.memory import lazy_bytes
from server.model.prepare import prepare_model
from server.model.step_context import AdapterTable, StepContext

ADAPTER_SLOTS = 1024  # rows of the record tables, 72 bytes per slot and module: 16 MB for the default model


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
    memory = DeviceMemory.of(base, dtype, limits)
    buffer = lazy_bytes(memory.num_pages * memory.page_bytes, base.device)
    context = prepare_model(base, quantization, dtype)
    blocks = BlockPool(memory.kv_pages, BLOCK_SIZE, memory.kv_floor)
    own = PageAllocator(memory.num_pages - memory.kv_pages, memory.page_bytes, memory.kv_pages)
    adapters = AdapterPool(own, ADAPTER_SLOTS, blocks)
    table = AdapterTable(context.module_names, ADAPTER_SLOTS, base.device)
    context.cache, context.pool, context.table = _kv_cache(base, dtype, memory.kv_pages, buffer), buffer, table
    scheduler = Scheduler(
        blocks,
        adapters,
        token_budget=limits.max_batch_tokens,
        max_running=limits.max_running,
    )
    host = HostCache(limits.host_adapter_memory, lambda digest: adapters.residency(digest) is Residency.RESIDENT)
    on_gpu = dispatch.load(base.device) == "triton"
    graphs = _decode_graphs(base, context, limits) if on_gpu else None
    packing = partial(pack, embeddings=base.spec.embeddings, page_bytes=memory.page_bytes, pinned=on_gpu)
    return EngineCore(
        scheduler,
        ModelRunner(base, context, adapters, BLOCK_SIZE, limits.max_rank, graphs),
        AdapterStorage(buffer, table, SideStreamCopier(base.device) if on_gpu else None),
        AdapterLoader(load, packing, wake, host),
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
    context = _max_context(base, limits, blocks.shared_from)
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
        host_adapter_memory_bytes=limits.host_adapter_memory,
        device_memory_bytes=core.scheduler.adapters.device_bytes,
        aliases=base.spec.aliases,
    )
    grammars = GrammarCompiler(base.tokenizer, base.vocabulary, base.eos_token_ids)
    parts = (core, Tokenizer(base.tokenizer), grammars, info, base.eos_token_ids)
    engine.append(AsyncEngine(*parts, stuck_seconds=limits.stuck_seconds))
    return engine[0]


def _max_context(base: BaseModel, limits: EngineLimits, blocks: int) -> int:
    return min(limits.max_context or base.max_context, base.max_context, blocks * BLOCK_SIZE)


def _decode_graphs(base: BaseModel, context: StepContext, limits: EngineLimits) -> DecodeGraphs:
    assert context.cache is not None
    width = -(-_max_context(base, limits, context.cache.num_pages) // BLOCK_SIZE)
    rows = min(limits.max_running, limits.max_batch_tokens)
    return DecodeGraphs(base, context, rows, DecodeShape(width, BLOCK_SIZE, limits.max_rank), CudaCapture)


def _kv_cache(base: BaseModel, dtype: torch.dtype, pages: int, buffer: torch.Tensor) -> KVCache:
    shape = (pages, base.num_layers, base.num_kv_heads, base.head_dim)
    return KVCache(*shape, dtype=dtype, device=base.device, page_size=BLOCK_SIZE, buffer=buffer)

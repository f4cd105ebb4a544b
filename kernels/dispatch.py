"""The one door to the kernels: C++ on a CPU where it can be built, Triton on a GPU, else the reference.

The C++ kernels check shapes, types and indices themselves, in under a microsecond; what goes to the reference is
checked by `kernels.checks`. Either way a mistake is a ValueError that names the numbers, before anything is written.
On a GPU only shapes and types are checked: looking at a step's numbers would wait for the device.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from kernels import checks, int8, reference
from kernels.fixed_segments import FixedSegments
from kernels.segments import Limits, Segments

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_cpu_loaded: bool | None = None  # None: not tried yet
_gpu_found: bool | None = None  # whether there is triton


def load(device: str | torch.device = "cpu") -> str:
    """Prepare the kernels of this device now, not at the first call; returns the name of what will run.

    Building takes about a minute, once per machine. Call this before `torch.compile` traces a call.
    """
    if torch.device(device).type == "cuda":
        return "triton" if _has_triton() else "reference"
    if torch.device(device).type != "cpu":
        return "reference"
    global _cpu_loaded
    if _cpu_loaded is None:
        from kernels.cpu import build  # no work at import

        _cpu_loaded = build.load()
    return "cpu" if _cpu_loaded else "reference"


def cpu_key() -> str:
    """Short name of this kind of CPU: what a compiler made for one may not run on another."""
    from kernels.cpu import build

    return build.cpu_key()


def keep_threads(count: int) -> None:
    """Have every kernel that this thread calls use `count` CPU threads, whatever another thread sets later.

    Torch reads the common setting at a thread's first use of it; so do our kernels, for themselves.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()
    if _cpu_loaded:
        torch.ops.polyrank.threads()


def place(segments: Segments, device: str | torch.device, limits: Limits | None = None) -> Segments:
    """A step's segments, given in host memory, on the device, with what its kernels need beside them.

    limits: what any adapter of this server may be, None for the defaults.
    On a GPU this copies without waiting; what it is given must fit the rows and slots of the step, for no kernel looks.
    """
    if torch.device(device).type == "cpu":
        return segments
    chunks = None
    if torch.device(device).type == "cuda" and _has_triton():
        from kernels.triton.chunks import chunks_of

        chunks = chunks_of(segments, device, limits)
    return Segments(
        slot=segments.slot.to(device, non_blocking=True),
        start=segments.start.to(device, non_blocking=True),
        token=segments.token.to(device, non_blocking=True),
        weight=segments.weight.to(device, non_blocking=True),
        chunks=chunks,
    )


def fixed(capacity: int, device: str | torch.device, limits: Limits) -> FixedSegments:
    """As `place`, but at addresses that stay, for steps of at most `capacity` entries."""
    with_chunks = torch.device(device).type == "cuda" and _has_triton()
    return FixedSegments(capacity, device, limits, with_chunks=with_chunks)


def lowrank(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """`reference.lowrank`."""
    if segments.slot.shape[0] == 0:  # not len(): under a trace the size is a symbol
        return y
    if _on_cpu(y) and x.dtype in _TYPES:
        torch.ops.polyrank.lowrank_(y, x, pool, records, segments.slot, segments.start, segments.token, segments.weight)
        return y
    if segments.chunks is not None and _on_gpu(y, x):
        lowrank_group([y], x, pool, [records], segments)
        return y
    checks.product(y, x, pool, records, segments)
    return reference.lowrank(y, x, pool, records, segments)


def lowrank_group(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    pool: torch.Tensor,
    records_list: Sequence[torch.Tensor],
    segments: Segments,
) -> None:
    """`lowrank` of up to 3 modules that read the same x (q, k, v; gate, up): on a GPU one or two launches for all."""
    if len(ys) != len(records_list) or not 1 <= len(ys) <= 3:
        raise ValueError(f"{len(ys)} outputs and {len(records_list)} tables of records; 1 to 3 of both expected")
    alike = len({(y.dtype, records.stride()) for y, records in zip(ys, records_list, strict=True)}) == 1
    if segments.chunks is None or not _on_gpu(ys[0], x) or not alike:
        for y, records in zip(ys, records_list, strict=True):
            lowrank(y, x, pool, records, segments)
        return
    from kernels.triton import lowrank as gpu

    for y, records in zip(ys, records_list, strict=True):
        checks.product(y, x, pool, records, None)
    gpu.lowrank_group(ys, x, pool, records_list, segments.chunks)


def lowrank_around(
    product: Callable[[], Sequence[torch.Tensor]],
    outer: int,
    x: torch.Tensor,
    pool: torch.Tensor,
    records_list: Sequence[torch.Tensor],
    segments: Segments,
) -> Sequence[torch.Tensor]:
    """The outputs of `product`, which reads x, with `lowrank_group` done: on a GPU `A x` is computed beside it.

    What the adapters need of x waits for memory, not for the processors, so beside a product it costs next to nothing.
    outer: outputs of the widest module.
    """
    chunks = segments.chunks
    if chunks is not None and _on_gpu(x, x):
        from kernels.triton import lowrank as gpu

        def checked() -> Sequence[torch.Tensor]:
            ys = product()
            for y, records in zip(ys, records_list, strict=True):
                checks.product(y, x, pool, records, None)
            return ys

        if gpu.beside(x, outer, chunks):
            return gpu.lowrank_around(checked, x, pool, records_list, chunks)
    ys = product()
    lowrank_group(ys, x, pool, records_list, segments)
    return ys


def gated_lowrank(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    records: torch.Tensor,
    gates: torch.Tensor,
    segments: Segments,
) -> torch.Tensor:
    """`reference.gated_lowrank`."""
    if segments.slot.shape[0] == 0:
        return y
    if _on_cpu(y) and x.dtype in _TYPES:
        torch.ops.polyrank.gated_lowrank_(
            y, x, pool, records, gates, segments.slot, segments.start, segments.token, segments.weight
        )
        return y
    if segments.chunks is not None and _on_gpu(y, x):
        from kernels.triton import lowrank as gpu

        checks.product(y, x, pool, records, None)
        checks.gates(gates, records, None)
        gpu.gated_lowrank(y, x, pool, records, gates, segments.chunks)
        return y
    checks.product(y, x, pool, records, segments)
    checks.gates(gates, records, segments)
    return reference.gated_lowrank(y, x, pool, records, gates, segments)


def lowrank_embedding(
    y: torch.Tensor, ids: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """`reference.lowrank_embedding`."""
    if segments.slot.shape[0] == 0:
        return y
    if _on_cpu(y):
        torch.ops.polyrank.lowrank_embedding_(
            y, ids, pool, records, segments.slot, segments.start, segments.token, segments.weight
        )
        return y
    if segments.chunks is not None and _on_gpu(y, y):
        from kernels.triton import lowrank as gpu

        checks.embedding(y, ids, pool, records, None)
        gpu.lowrank_embedding(y, ids, pool, records, segments.chunks)
        return y
    checks.embedding(y, ids, pool, records, segments)
    return reference.lowrank_embedding(y, ids, pool, records, segments)


def replace_weight(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, records: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """`reference.replace_weight`."""
    if segments.slot.shape[0] == 0:
        return y
    if _on_cpu(y) and x.dtype in _TYPES:
        torch.ops.polyrank.replace_weight_(
            y, x, pool, records, segments.slot, segments.start, segments.token, segments.weight
        )
        return y
    if segments.chunks is not None and _on_gpu(y, x):
        from kernels.triton import lowrank as gpu

        checks.product(y, x, pool, records, None)
        gpu.replace_weight(y, x, pool, records, segments.chunks)
        return y
    checks.product(y, x, pool, records, segments)
    return reference.replace_weight(y, x, pool, records, segments)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.linear`."""
    if _on_cpu(x):
        y: torch.Tensor = torch.ops.polyrank.linear(x, weight, bias)
        return y
    checks.float_product(x, weight, bias)
    return reference.linear(x, weight, bias)


def int8_pack(weight: torch.Tensor) -> torch.Tensor:
    """An int8 weight [out, in] as `int8_linear` takes it on this machine."""
    if weight.shape[1] > int8.MAX_INPUTS:
        raise ValueError(f"{weight.shape[1]} inputs; a 32-bit sum holds {int8.MAX_INPUTS}")
    if not (weight.is_cpu and load() == "cpu"):
        return weight.contiguous()
    return int8.pack(weight, torch.ops.polyrank.int8_panel())


def int8_unpack(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The weight that `int8_pack` was given."""
    return packed if packed.dtype == torch.int8 else int8.unpack(packed, outputs, inputs)


def int8_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`reference.int8_linear`, to the bit; the weight as `int8_pack` gave it."""
    if packed.dtype == torch.uint8:
        y: torch.Tensor = torch.ops.polyrank.int8_linear(x, packed, scale, bias)
        return y
    checks.int8_product(x, packed, scale, bias)
    return reference.int8_linear(x, packed, scale, bias)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """`reference.write_kv`."""
    if _on_cpu(key) and key_pool.dtype in _TYPES:
        torch.ops.polyrank.write_kv(key, value, key_pool, value_pool, slots)
        return
    if _pages_on_gpu(key, key_pool, value_pool):
        from kernels.triton import attention as gpu

        checks.page_shapes(key, value, key_pool, value_pool, slots)
        gpu.write_kv(key, value, key_pool, value_pool, slots)
        return
    checks.pages(key, value, key_pool, value_pool, slots)
    reference.write_kv(key, value, key_pool, value_pool, slots)


def paged_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """`reference.paged_attention`."""
    if _on_cpu(query) and key_pool.dtype in _TYPES:
        out: torch.Tensor = torch.ops.polyrank.paged_attention(
            query, key_pool, value_pool, query_start, kv_length, block_table, scale, window, softcap
        )
        return out
    if _pages_on_gpu(query, key_pool, value_pool):
        from kernels.triton import attention as gpu

        checks.attention_shapes(query, key_pool, value_pool, query_start, kv_length, block_table)
        return gpu.attention(query, key_pool, value_pool, query_start, kv_length, block_table, scale, window, softcap)
    checks.attention(query, key_pool, value_pool, query_start, kv_length, block_table, window)
    return reference.paged_attention(
        query, key_pool, value_pool, query_start, kv_length, block_table, scale, window, softcap
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    kv_length: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """`write_kv`, then `paged_attention`. Compiled code takes it for a function that only reads."""
    if _on_cpu(query) and key_pool.dtype in _TYPES:
        out: torch.Tensor = torch.ops.polyrank.attend(
            query, key, value, key_pool, value_pool, slots, query_start, kv_length, block_table, scale, window, softcap
        )
        return out
    write_kv(key, value, key_pool, value_pool, slots)
    return paged_attention(query, key_pool, value_pool, query_start, kv_length, block_table, scale, window, softcap)


def _on_cpu(tensor: torch.Tensor) -> bool:
    if not (tensor.is_cpu and tensor.dtype in _TYPES):
        return False
    return load() == "cpu" if _cpu_loaded is None else _cpu_loaded


def _on_gpu(y: torch.Tensor, x: torch.Tensor) -> bool:
    return y.is_cuda and y.dtype in _TYPES and x.dtype in _TYPES and _has_triton()


def _pages_on_gpu(tokens: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor) -> bool:
    """The kernels take pools of equal strides, as those of a KV cache are."""
    return _on_gpu(tokens, key_pool) and key_pool.stride() == value_pool.stride() and key_pool.stride(3) == 1


def _has_triton() -> bool:
    global _gpu_found
    if _gpu_found is None:
        _gpu_found = find_spec("triton") is not None
    return _gpu_found

"""The launch table: block sizes, parts, warps and stages by class of shape.

The medium and wide rows of half types were tuned on an H100 (2026-11-26, shapes of Llama-3.1-8B, ranks 8 to 64, 8 and
128 rows of as many adapters), the others are computed.

A row's bits must not depend on its batch, so what changes the order of a sum (parts, BLOCK_K, BLOCK_R) is a matter of
the module's shape and types alone, and the same in the fused kernel. The number of rows chooses only between fused and
separate kernels, which give the same bits.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import triton

from kernels.segments import INT4

DECODE_ENTRIES = 64  # up to here a step counts as decode: few chunks, so a launch costs more than reading A again
FUSED_WEIGHTS = 2**22  # inputs times outputs, up to which reading A anew for each tile of outputs stays in the L2 cache
BESIDE_ENTRIES = 256  # up to which a shrink goes beside the base product: above, that one has no processor to spare
REGISTERS = 255  # per thread, on NVIDIA: the most there are

# Without contraction of products and sums, fused and separate kernels cannot round at different places.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


class Width(StrEnum):
    """Class of a module's number of inputs (shrink) or outputs (expand)."""

    NARROW = "narrow"  # at most 1024
    MEDIUM = "medium"  # at most 8192
    WIDE = "wide"


@dataclass(frozen=True, slots=True)
class Launch:
    """One row. `block`: inputs (shrink) or outputs (expand) of a program's tile; `parts`: pieces of the inputs."""

    block: int
    block_r: int
    parts: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {**OPTIONS, "num_warps": self.warps, "num_stages": self.stages}


# By (x is a half type, width of the inputs). Parts of 512 to 1024 inputs, so that a step of 8 rows has enough programs
# to keep the memory busy: for q, k and v 10 us became 5, for down (14,336 inputs) 17 became 7. float32 products run on
# the ordinary units, out of registers: smaller tiles.
SHRINK = {
    (True, Width.NARROW): Launch(block=64, block_r=32, parts=1, warps=4, stages=4),
    (True, Width.MEDIUM): Launch(block=64, block_r=64, parts=8, warps=4, stages=4),
    (True, Width.WIDE): Launch(block=64, block_r=64, parts=16, warps=4, stages=4),
    (False, Width.NARROW): Launch(block=32, block_r=32, parts=1, warps=8, stages=2),
    (False, Width.MEDIUM): Launch(block=32, block_r=32, parts=4, warps=8, stages=2),
    (False, Width.WIDE): Launch(block=32, block_r=32, parts=8, warps=8, stages=2),
}
# By (y is a half type, width of the outputs); block_r as in SHRINK, parts are those of the shrink. Programs wait for
# memory most of the time, so what counts is how many of them the registers hold: ranks by 16 instead of 32, and no
# bound that lets a program have more, took gate and up from 16 to 14 us for 8 rows, from 192 to 159 for 128 (bytes: 5
# and 72).
EXPAND = {
    (True, Width.NARROW): Launch(block=64, block_r=32, parts=0, warps=4, stages=2),
    (True, Width.MEDIUM): Launch(block=128, block_r=16, parts=0, warps=4, stages=3),
    (True, Width.WIDE): Launch(block=128, block_r=16, parts=0, warps=4, stages=3),
    (False, Width.NARROW): Launch(block=64, block_r=32, parts=0, warps=8, stages=2),
    (False, Width.MEDIUM): Launch(block=64, block_r=32, parts=0, warps=8, stages=2),
    (False, Width.WIDE): Launch(block=64, block_r=32, parts=0, warps=8, stages=2),
}

# By x is a half type; `block_r`: outputs of a tile. A head is read once for each of its chunks of rows.
REPLACE = {
    True: Launch(block=64, block_r=64, parts=1, warps=4, stages=3),
    False: Launch(block=32, block_r=32, parts=1, warps=8, stages=2),
}


def expand_options(row: Launch, fuse: bool, factors: int, nvidia: bool) -> dict[str, Any]:
    """Warps, stages and, for some, a bound of registers: else ptxas spills a value or two to fit more blocks in.

    Fused, the values of both products are alive: 8 warps share them.
    """
    options = {**row.options, "num_warps": 8} if fuse else row.options
    bound = nvidia and (fuse or factors >> INT4 & 1)
    return {**options, "maxnreg": REGISTERS} if bound else options


def shrink_options(row: Launch, factors: int) -> dict[str, Any]:
    """With code for several types a fourth stage makes ptxas spill, with 4-bit ones among them 4 warps do too."""
    if not several(factors):
        return row.options
    warps = 8 if int4_among(factors) else row.warps
    return {**row.options, "num_stages": min(row.stages, 3), "num_warps": warps}


def shrink_ranks(row: Launch, factors: int) -> int:
    """Ranks of a tile: with code for 4-bit factors among others 64 would spill."""
    return min(row.block_r, 32) if int4_among(factors) else row.block_r


def several(factors: int) -> bool:
    """Whether `Limits.factors` names more than one type."""
    return bool(factors & (factors - 1))


def int4_among(factors: int) -> bool:
    """Whether 4-bit factors are one of several types."""
    return several(factors) and bool(factors >> INT4 & 1)


def width_class(size: int) -> Width:
    return Width.NARROW if size <= 1024 else Width.MEDIUM if size <= 8192 else Width.WIDE


def shrink_launch(x: torch.dtype, inner: int) -> Launch:
    return SHRINK[x != torch.float32, width_class(inner)]


def expand_launch(y: torch.dtype, outer: int, factors: int) -> Launch:
    """`outer`: the widest of a group. With code for 4-bit factors among others wider tiles would spill registers."""
    width = width_class(outer)
    if int4_among(factors) and y != torch.float32:
        width = Width.NARROW
    return EXPAND[y != torch.float32, width]


def fused(entries: int, inner: int, outer: int, factors: int) -> bool:
    """Whether one kernel does both products; `outer`: the widest of a group. For several types it would spill."""
    return entries <= DECODE_ENTRIES and inner * outer <= FUSED_WEIGHTS and not several(factors)


PARTITION = 512  # keys of one softmax; of a fixed length, so that a row's bits do not depend on who shares the step
SPLIT_PROGRAMS = 256  # up to here the rows alone leave processors idle
SPLIT_GRID = 2**15  # above, starting programs that find no keys costs more than it gains
WRITE_BLOCK = 1024  # numbers of a row that one program of `write_kv` or `silu_mul` stores
ROTATED = 512  # numbers of the halves of heads that one program of `rotate` turns


def row_options(block: int) -> dict[str, Any]:
    """For programs that hold `block` numbers of a row: at most 32 of them to a thread."""
    return {**OPTIONS, "num_warps": min(16, max(4, block // 1024)), "num_stages": 2}


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    """Rows, keys and padded head size of a program's tile."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int

    def options(self, nvidia: bool) -> dict[str, Any]:
        """As `expand_options`."""
        options = {**OPTIONS, "num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": REGISTERS} if nvidia else options


def attention_launch(group: int, dim: int, query: torch.dtype, pool: torch.dtype) -> AttentionLaunch:
    """By the model's shapes and types alone: another tile would be another order of sums.

    16 rows, or what the heads of one KV head (`group`) take: decode, with a query or a few per tile, reads its keys at
    the speed of memory either way, and larger tiles would only help long prompts. float32 runs on the ordinary units.
    """
    block_m, block_d = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(dim))
    half = query == pool != torch.float32
    block_n = min(64, 64 * 128 // block_d) if half else min(32, 32 * 64 // block_d)
    return AttentionLaunch(block_m, max(16, block_n), block_d, warps=4 if half else 8, stages=2)


def split(programs: int, partitions: int) -> bool:
    """Whether every partition gets a program of its own; `programs`: tiles of rows times KV heads."""
    return partitions > 1 and programs <= SPLIT_PROGRAMS and programs * partitions <= SPLIT_GRID


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Itself if its last axis has unit stride, as the kernels want it, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

"""Layout of 8-bit weights: plain [out, in], or packed for the C++ kernel (kernels/cpu/int8_linear.cpp)."""

import torch
from torch.nn import functional as F

PANEL = 48  # outputs that lie interleaved
DEPTH = 4  # inputs that one instruction multiplies and adds
SHIFT = 128  # added to a packed weight, which makes it unsigned
MAX_INPUTS = 2**31 // 127**2  # 133,152: beyond, a 32-bit sum may overflow


def pack(weight: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] -> uint8 [panels, in / 4, 48, 4], filled up with zero weights; the same bytes but for those."""
    outputs, inputs = weight.shape
    filled = F.pad(weight, (0, -inputs % DEPTH, 0, -outputs % PANEL))
    panels = filled.view(-1, PANEL, filled.shape[1] // DEPTH, DEPTH).transpose(1, 2)
    return (panels.contiguous().view(torch.uint8)).bitwise_xor_(SHIFT)


def unpack(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """What `pack` was given."""
    weight = packed.bitwise_xor(SHIFT).view(torch.int8).transpose(1, 2).reshape(len(packed) * PANEL, -1)
    return weight[:outputs, :inputs].contiguous()

"""Layout of 8-bit weights: plain [out, in], or packed for the C++ kernel (kernels/cpu/int8_linear.cpp)."""

import torch
from torch.nn import functional as F

DEPTH = 4  # inputs that one instruction multiplies and adds
SHIFT = 128  # added to a packed weight, which makes it unsigned
MAX_INPUTS = 2**31 // 127**2  # 133,152: beyond, a 32-bit sum may overflow


def pack(weight: torch.Tensor, panel: int) -> torch.Tensor:
    """int8 [out, in] -> uint8 [panels, in / 4, panel, 4], filled up with zero weights; the same bytes but for those.

    panel: outputs that lie interleaved, as the kernel built for this CPU wants them.
    """
    outputs, inputs = weight.shape
    filled = F.pad(weight, (0, -inputs % DEPTH, 0, -outputs % panel))
    panels = filled.view(-1, panel, filled.shape[1] // DEPTH, DEPTH).transpose(1, 2)
    return (panels.contiguous().view(torch.uint8)).bitwise_xor_(SHIFT)


def unpack(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """What `pack` was given."""
    weight = packed.bitwise_xor(SHIFT).view(torch.int8).transpose(1, 2).reshape(len(packed) * packed.shape[2], -1)
    return weight[:outputs, :inputs].contiguous()

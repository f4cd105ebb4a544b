"""The base product in floats through our own kernel."""

import torch
from torch import nn

from kernels import dispatch
from server.model.spec import adapter_kind


class FloatLinear(nn.Module):
    """Stands for an `nn.Linear` on a CPU, with the same parameters (a tied weight stays tied)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.out_features, self.in_features = base.out_features, base.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = dispatch.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def float_linear(module: nn.Module) -> nn.Module:
    """`FloatLinear` for a linear that the kernel can take, else the module itself."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    fits = weight.is_cpu and weight.is_contiguous() and adapter_kind(module) == "linear"
    if fits and dispatch.load(weight.device) == "cpu":
        assert isinstance(module, nn.Linear)
        return FloatLinear(module)
    return module

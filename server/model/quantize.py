"""Base products in 8-bit integers: weights rounded per output channel at load, activations per row at each step."""

import torch
from torch import nn

from kernels import dispatch, reference
from server.model.adapter_linear import AdapterLinear
from server.model.base import BaseModel
from server.model.errors import ModelLoadError
from server.model.spec import adapter_kind

CHOICES = ("none", "int8")


class Int8Linear(nn.Module):
    """The base of an `AdapterLinear` instead of an `nn.Linear` or `Conv1D`; adapters read the same rows unrounded."""

    packed: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, base: nn.Module, tied: torch.Tensor | None = None) -> None:
        """base: the module that this one stands for; tied: its weight, if an embedding keeps that alive anyway."""
        super().__init__()
        weight, bias = base.weight, base.bias
        assert isinstance(weight, torch.Tensor)
        self.transposed = adapter_kind(base) == "conv1d"  # GPT-2's Conv1D has [in, out]
        values, scale = reference.int8_rows(weight.detach().T if self.transposed else weight.detach())
        self.out_features, self.in_features = values.shape
        self.dtype = weight.dtype
        self.register_buffer("packed", dispatch.int8_pack(values), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        floats = bias.detach().float() if isinstance(bias, torch.Tensor) else None
        self.register_buffer("bias", floats, persistent=False)
        self._tied = (tied,)  # in a tuple, so that it does not become a parameter of this module

    @property
    def weight(self) -> torch.Tensor:
        """For model code that asks for its type or shape: the embedding's own table where tied, else the rounded
        weight in the model's type, made anew at each call."""
        if self._tied[0] is not None:
            return self._tied[0]
        values = dispatch.int8_unpack(self.packed, self.out_features, self.in_features)
        weight = (values * self.scale[:, None]).to(self.dtype)
        return weight.T if self.transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = dispatch.int8_linear(x.reshape(-1, self.in_features), self.packed, self.scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def check_quantization(quantization: str, device: str | torch.device) -> None:
    """Raise ModelLoadError unless this kind exists on this device."""
    if quantization not in CHOICES:
        raise ModelLoadError(f"Unknown quantization '{quantization}'; known are {', '.join(CHOICES)}.")
    if quantization == "int8" and torch.device(device).type != "cpu":
        raise ModelLoadError(
            f"--quantize int8 has kernels for the CPU only, and the model runs on {device}. Leave it out, or say "
            "--device cpu."
        )


def quantize(base: BaseModel) -> None:
    """Round every linear of a wrapped model to int8 in place, the head included, and free the weights themselves.

    One module after another, so the peak is one weight above what was loaded. Embeddings keep their type: a head
    that shares its table with them gets an int8 copy. For the default model in bfloat16 the linears and the head go
    from 212 MB to 134 MB, beside the 57 MB of the embedding.
    """
    embeddings = {
        id(module.weight): module.weight for module in base.model.modules() if isinstance(module, nn.Embedding)
    }
    for module in base.model.modules():
        if isinstance(module, AdapterLinear):
            module.base = Int8Linear(module.base, embeddings.get(id(module.base.weight)))
    base.model.eval()

"""Linears of one input as one product."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from kernels import dispatch
from server.model.adapter_linear import AdapterLinear
from server.model.float_linear import FloatLinear
from server.model.step_context import StepContext


class JoinedLinears:
    """Up to 3 linears that read one x, whose weights are laid end to end: one product, then the adapters of all.

    The modules' own parameters become views of the joined ones, so whoever changes them in place changes both. A deep
    copy of the model would part them; only models on a CPU are copied, whose linears are not joined.
    """

    def __init__(self, members: Sequence[AdapterLinear], context: StepContext) -> None:
        self._context = context
        self.indices = [member.index for member in members]
        weights = [member.base.get_parameter("weight") for member in members]
        self._sizes = [len(weight) for weight in weights]
        self._weight = _joined(weights)
        biased = members[0].base.bias is not None
        self._bias = _joined([member.base.get_parameter("bias") for member in members]) if biased else None

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x: [T, in]; returns a [T, out] of each member, parts of one tensor."""
        context = self._context
        if context.segments is None or context.active.isdisjoint(self.indices):
            return self._product(x)
        assert context.pool is not None
        assert context.table is not None
        records = [context.table.records[index] for index in self.indices]
        return dispatch.lowrank_around(
            lambda: self._product(x), max(self._sizes), x, context.pool, records, context.segments
        )

    def _product(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        y = F.linear(x, self._weight, self._bias)
        return [y] if len(self._sizes) == 1 else torch.split(y, self._sizes, dim=1)


def adapted_linears(modules: Sequence[nn.Module]) -> list[AdapterLinear]:
    """These modules; raises ValueError unless they are linears that can be joined: all alike but for their outputs."""
    found = [module for module in modules if isinstance(module, AdapterLinear)]
    bases = [module.base for module in found if isinstance(module.base, nn.Linear | FloatLinear)]
    alike = {(base.in_features, base.weight.dtype, base.bias is None) for base in bases}
    if len(bases) != len(modules) or len(alike) != 1:
        raise ValueError("its linears are no plain ones of one kind")
    return found


def _joined(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    if len(parameters) == 1:
        return parameters[0]
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, torch.split(joined, [len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined

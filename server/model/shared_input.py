"""Linears that read the same x (q, k, v; gate, up): on a GPU their adapters are added in one launch.

Model code calls such linears one after another. The first one computes its siblings too and keeps what they will be
asked for; whether a sibling is asked with that very tensor is checked at each call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from kernels import dispatch
from server.model.adapter_linear import AdapterLinear
from server.model.base import BaseModel

MOST = 3  # linears of one launch

Seen = list[tuple[AdapterLinear, torch.Tensor]]  # calls in order; the tensors are kept, so that no two are mistaken


@dataclass(eq=False, slots=True)
class SharedInput:
    """Siblings in the order of their calls, and what has been computed ahead for those yet to be called."""

    members: list["SharedLinear"] = field(default_factory=list)
    x: torch.Tensor | None = None
    ahead: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """The product of module `index` with x, if it was computed ahead."""
        y = self.ahead.pop(index, None) if x is self.x else None
        if not self.ahead:
            self.x = None
        return y


class SharedLinear(AdapterLinear):
    """An `AdapterLinear` with siblings."""

    def __init__(self, alone: AdapterLinear, shared: SharedInput) -> None:
        super().__init__(alone.base, alone.context, alone.index)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `AdapterLinear.forward`."""
        shared, context = self.shared, self.context
        ahead = shared.take(self.index, x)
        if ahead is not None:
            return ahead
        together = [m for m in shared.members if m.index in context.active and m.index not in context.special]
        first = self is shared.members[0] and self in together and len(together) > 1
        if not first or context.segments is None or context.pool is None or context.table is None:
            return super().forward(x)
        ys: list[torch.Tensor] = [member.base(x) for member in together]
        records = [context.table.records[member.index] for member in together]
        flat_x, flat_ys = x.reshape(-1, x.shape[-1]), [y.view(-1, y.shape[-1]) for y in ys]
        dispatch.lowrank_group(flat_ys, flat_x, context.pool, records, context.segments)
        shared.x, shared.ahead = x, {member.index: y for member, y in zip(together[1:], ys[1:], strict=True)}
        return ys[0]


@contextmanager
def watch_inputs(base: BaseModel) -> Iterator[Seen]:
    """Notes which tensor each adapter-aware linear of a wrapped model is called with."""
    seen: Seen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
        for module in base.model.modules()
        if isinstance(module, AdapterLinear) and not module.head
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def share_inputs(base: BaseModel, seen: Seen) -> list[tuple[str, ...]]:
    """Replace, in place, linears that were called with one tensor and belong to one module; returns their names."""
    names = {module: name for name, module in base.model.named_modules() if isinstance(module, AdapterLinear)}
    groups: dict[tuple[int, str], list[AdapterLinear]] = {}
    placed: set[AdapterLinear] = set()
    for module, x in seen:
        if module not in placed:
            placed.add(module)
            groups.setdefault((id(x), names[module].rpartition(".")[0]), []).append(module)
    shared_names = []
    for (_, parent), siblings in groups.items():
        for first in range(0, len(siblings), MOST):
            piece = siblings[first : first + MOST]
            if len(piece) > 1:
                _share(base.model.get_submodule(parent), {names[m].rpartition(".")[2]: m for m in piece})
                shared_names.append(tuple(names[m] for m in piece))
    return shared_names


def _share(parent: nn.Module, siblings: dict[str, AdapterLinear]) -> None:
    shared = SharedInput()
    for name, module in siblings.items():
        shared.members.append(SharedLinear(module, shared))
        setattr(parent, name, shared.members[-1])

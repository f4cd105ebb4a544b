"""Random gated adapters in a pool, with their gate records."""

from dataclasses import dataclass

import torch

from kernels.segments import FACTOR_DTYPES, GATE_FIELDS, GateField
from tests.kernels.support import PoolBuilder, lowrank_adapter


@dataclass(frozen=True)
class Spec:
    """An adapter: its gate has `rows` router rows (0: no gate) and uses `active` ranks."""

    rank: int
    rows: int
    active: int


@dataclass(frozen=True)
class Gated:
    """Slot i is adapter i; the blocks of counts begin at zero."""

    pool: torch.Tensor
    records: torch.Tensor
    gates: torch.Tensor

    def counts(self, slot: int) -> list[int]:
        gate = self.gates[slot]
        block = self.pool[int(gate[GateField.COUNTS]) :][: 8 * int(gate[GateField.RANK])]
        numbers: list[int] = block.view(torch.int64).tolist()
        return numbers

    def block(self, slot: int, column: GateField, count: int) -> torch.Tensor:
        """`count` float32 numbers of a gate's block, to read or to write."""
        return self.pool[int(self.gates[slot, column]) :][: 4 * count].view(torch.float32)


def gated(
    inner: int,
    outer: int,
    specs: list[Spec],
    factor: torch.dtype | str,
    router: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    core: bool = False,
    offset: bool = False,
    counts: bool = True,
) -> Gated:
    """bias: of the scores; core: between A and B; offset: added after B."""
    builder, records, gates = PoolBuilder(), [], []
    for spec in specs:
        records.append(builder.add(lowrank_adapter(spec.rank, inner, outer, factor, core=core, bias=offset)))
        gate = [-1] * GATE_FIELDS
        gate[GateField.ROWS], gate[GateField.RANK], gate[GateField.ACTIVE] = spec.rows, spec.rank, spec.active
        gate[GateField.DTYPE] = FACTOR_DTYPES.index(router)
        if spec.rows:
            gate[GateField.ROUTER] = builder.put((torch.randn(spec.rows, inner) / inner**0.5).to(router))
            gate[GateField.BIAS] = builder.put(torch.randn(spec.rank) * 0.05 if bias else None)
            gate[GateField.COUNTS] = builder.put(torch.zeros(spec.rank, dtype=torch.int64) if counts else None)
        gates.append(gate)
    return Gated(builder.pool(), torch.tensor(records, dtype=torch.int64), torch.tensor(gates, dtype=torch.int64))

"""Bytes and FLOPs of one decode step with adapters, against a GPU's data sheet. Computed, not measured.

python -m tests.bench.roofline

Ours reads each distinct adapter's factors once per step, at their own rank and in their own type. "Padded" is a pool of
slots padded to one highest rank, as read by kernels without rank masks. The step is the longer of bytes over bandwidth
and FLOPs over the peak: launches, activations, keys and values, and what hardware keeps of its data sheet are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.workload import RANKS

SLOT_RANK = 64  # of the padded slots: the workload's highest
COUNTS = (1, 8, 32, 128)  # distinct adapters, one row each


@dataclass(frozen=True, slots=True)
class Model:
    """Linears of one layer as (inputs, outputs), and the parameters read per step outside the layers."""

    name: str
    layers: int
    linears: tuple[tuple[int, int], ...]
    head: int

    @property
    def parameters(self) -> int:
        """Weights that a decode step multiplies with: embeddings are looked up, not read."""
        return self.layers * sum(inner * outer for inner, outer in self.linears) + self.head

    @property
    def per_rank(self) -> int:
        """Adapter parameters per unit of rank, all linears of the layers adapted."""
        return self.layers * sum(inner + outer for inner, outer in self.linears)


@dataclass(frozen=True, slots=True)
class Device:
    """Data sheet: bytes per second of memory, dense bfloat16 FLOPs per second."""

    name: str
    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Step:
    """What one decode step reads and computes."""

    bytes: float
    flops: float

    def seconds(self, device: Device) -> float:
        return max(self.bytes / device.bandwidth, self.flops / device.flops)


# q, k, v, o, gate, up, down; source: config.json (hidden 4096, 8 KV heads of 128, 14336, vocabulary 128256).
LLAMA = Model(
    "Llama-3.1-8B",
    32,
    ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)),
    4096 * 128256,
)
DEVICES = (
    Device("H100 SXM", 3.35e12, 989e12),
    Device("A100 80GB SXM", 2.039e12, 312e12),
)


def base_step(model: Model, rows: int) -> Step:
    """The base model in bfloat16."""
    return Step(2.0 * model.parameters, 2.0 * model.parameters * rows)


def with_adapters(model: Model, ranks: Sequence[int], factor_bytes: int) -> Step:
    """One row for each rank: the base, and each adapter's A and B read once; the scales d are too few to count."""
    base, parameters = base_step(model, len(ranks)), model.per_rank * sum(ranks)
    return Step(base.bytes + factor_bytes * parameters, base.flops + 2.0 * parameters)


def mixed(count: int) -> list[int]:
    """Ranks as in the workload "distinct-8"."""
    return [RANKS[index % len(RANKS)] for index in range(count)]


def report(model: Model, device: Device) -> str:
    lines = [
        f"{model.name} on {device.name}: computed from the data sheet, not measured",
        f"{'adapters':>8} {'factors':>16} {'GB':>7} {'GFLOP':>7} {'ms':>6} {'of base':>8}",
    ]
    for count in COUNTS:
        base = base_step(model, count)
        rows = (
            ("none", base),
            ("exact, int8", with_adapters(model, mixed(count), 1)),
            ("exact, bf16", with_adapters(model, mixed(count), 2)),
            (f"padded {SLOT_RANK}, bf16", with_adapters(model, [SLOT_RANK] * count, 2)),
        )
        for name, step in rows:
            share = base.seconds(device) / step.seconds(device)
            lines.append(
                f"{count:>8} {name:>16} {step.bytes / 1e9:>7.2f} {step.flops / 1e9:>7.0f} "
                f"{step.seconds(device) * 1e3:>6.2f} {share:>8.1%}"
            )
    return "\n".join(lines)


def main() -> None:
    for device in DEVICES:
        print(report(LLAMA, device), end="\n\n")


if __name__ == "__main__":
    main()

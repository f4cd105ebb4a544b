"""The counters of gated adapters in device memory: where they lie, what is read of them, and where they begin."""

import pytest
import torch

from adapters_store.forms import AdapterWeights, Form, GatedLowRank, LowRank
from kernels import reference
from kernels.segments import GateField
from server.engine.adapter_pool import Placement
from server.engine.adapter_storage import AdapterStorage
from server.engine.packing import PackedAdapter, pack
from server.engine.status import ExpertLoad, mean_entropy
from server.model.step_context import AdapterTable
from tests.kernels.support import Group, segments_of

PAGE = 4096
WIDTH = 12


def gated(rank: int, active: int) -> GatedLowRank:
    factors = torch.randn(rank, WIDTH), torch.randn(WIDTH, rank), torch.ones(rank)
    return GatedLowRank(*factors, torch.randn(rank, WIDTH), None, active)


def packed(**modules: Form) -> PackedAdapter:
    weights = AdapterWeights("d" * 64, {name: (form,) for name, form in modules.items()})
    return pack(weights, frozenset(), PAGE)


class Device:
    """A buffer with two slots; slot i takes pages of its own."""

    def __init__(self) -> None:
        self.table = AdapterTable(["m", "n"], slots=2)
        self.buffer = torch.full((16 * PAGE,), 0xFF, dtype=torch.uint8)
        self.storage = AdapterStorage(self.buffer, self.table)

    def write(self, slot: int, adapter: PackedAdapter) -> None:
        offsets = tuple((8 * slot + index) * PAGE for index in range(len(adapter.sizes)))
        self.storage.write(Placement(slot, offsets, (slot,)), adapter)

    def compute(self, slot: int, module: int, rows: int) -> None:
        y, x, table = torch.zeros(rows, WIDTH), torch.randn(rows, WIDTH), self.table
        segments = segments_of(Group(slot, range(rows)))
        reference.gated_lowrank(y, x, self.buffer, table.records[module], table.gates[module], segments)


@pytest.fixture
def device() -> Device:
    torch.manual_seed(3)
    return Device()


def test_counters_are_read_by_module(device: Device) -> None:
    device.write(0, packed(m=gated(4, 2), n=gated(7, 3)))
    device.write(1, packed(m=gated(4, 2)))
    assert device.storage.experts(0) == {"m": ExpertLoad(2, (0,) * 4), "n": ExpertLoad(3, (0,) * 7)}
    assert device.storage.entropy(0) is None
    device.compute(0, 0, 50)
    device.compute(0, 1, 20)
    loads = device.storage.experts(0)
    assert (loads["m"].tokens, loads["n"].tokens) == (50, 20)
    assert len(set(loads["m"].counts)) > 1
    assert device.storage.experts(1)["m"].tokens == 0, "another adapter's"


@pytest.mark.parametrize("rank", [1, 5])
def test_entropy_is_that_of_the_loads(device: Device, rank: int) -> None:
    device.write(0, packed(m=gated(rank, 1), n=gated(8, 3)))
    device.compute(0, 0, 40)
    assert device.storage.entropy(0) == pytest.approx(mean_entropy(device.storage.experts(0)))
    device.compute(0, 1, 40)
    entropy = device.storage.entropy(0)
    assert entropy == pytest.approx(mean_entropy(device.storage.experts(0)))
    assert entropy is not None
    assert 0 < entropy <= 1


def test_a_new_tenant_of_a_slot_begins_at_zero(device: Device) -> None:
    adapter = packed(m=gated(4, 2))
    device.write(0, adapter)
    device.compute(0, 0, 9)
    assert device.storage.experts(0)["m"].tokens == 9
    device.write(0, adapter)
    assert device.storage.experts(0)["m"].tokens == 0


def test_a_lora_has_none(device: Device) -> None:
    device.write(0, packed(m=gated(4, 2)))
    device.write(0, packed(m=LowRank(torch.randn(2, WIDTH), torch.randn(WIDTH, 2), torch.ones(2))))
    assert not device.storage.gated(0)
    assert device.storage.experts(0) == {}
    assert device.storage.entropy(0) is None
    assert bool((device.table.gates[:, 0, GateField.ROWS] == 0).all())

"""The table of adapter records and the switch that says which modules a step touches."""

import torch

from kernels.segments import RECORD_FIELDS, Field, Segments
from server.model.step_context import AdapterTable, AttentionMetadata, StepContext

NAMES = ("embed", "layers.0.q", "head")
ATTENTION = AttentionMetadata(*(torch.zeros(1, dtype=torch.int32) for _ in range(4)))
SEGMENTS = Segments(
    slot=torch.tensor([1], dtype=torch.int32),
    start=torch.tensor([0, 1], dtype=torch.int32),
    token=torch.tensor([0], dtype=torch.int32),
    weight=torch.ones(1),
)


def record(**fields: int) -> list[int]:
    values = [-1] * RECORD_FIELDS
    values[Field.RANK] = values[Field.DTYPE] = 0
    for name, value in fields.items():
        values[Field[name]] = value
    return values


def test_an_empty_table_holds_no_adapter() -> None:
    table = AdapterTable(NAMES, 4)
    assert table.records.shape == (3, 4, RECORD_FIELDS)
    assert table.records.dtype == torch.int64
    assert table.records[2, 3].tolist() == record()
    assert table.touched(range(4)) == table.replaced(range(4)) == frozenset()


def test_set_and_clear_one_slot() -> None:
    table = AdapterTable(NAMES, 3)
    address = table.records.data_ptr()
    table.set(1, 0, record(RANK=8, A=0, B=64, D=128))
    table.set(1, 2, record(WEIGHT=256))
    table.set(2, 1, record(BIAS=512))
    assert table.records[0, 1].tolist() == record(RANK=8, A=0, B=64, D=128)
    assert sorted(table.touched([1])) == [0]
    assert sorted(table.replaced([1])) == [2]
    assert sorted(table.touched([1, 2])) == [0, 1]
    assert not table.replaced([0, 2])
    table.clear(1)
    assert table.records[:, 1].tolist() == [record()] * 3
    assert sorted(table.touched([1, 2])) == [1]
    assert not table.replaced([1, 2])
    assert table.records.data_ptr() == address


def test_an_adapter_is_written_whole_over_the_one_before() -> None:
    table = AdapterTable(NAMES, 2)
    address = table.records.data_ptr()
    table.write(0, {0: record(RANK=4, A=64), 2: record(WEIGHT=128)})
    table.write(1, {1: record(BIAS=0)})
    table.write(0, {1: record(RANK=2, A=32)})
    assert table.records[:, 0].tolist() == [record(), record(RANK=2, A=32), record()]
    assert table.records[:, 1].tolist() == [record(), record(BIAS=0), record()]
    assert (sorted(table.touched([0])), sorted(table.replaced([0]))) == ([1], [])
    assert table.records.data_ptr() == address


def test_a_record_without_effect_touches_nothing() -> None:
    table = AdapterTable(NAMES, 1)
    table.set(0, 1, record())
    assert table.touched([0]) == frozenset()


def test_begin_collects_what_the_step_touches() -> None:
    context = StepContext(NAMES, "head")
    context.table = AdapterTable(NAMES, 2)
    context.table.set(0, 1, record(RANK=2))
    context.table.set(1, 2, record(RANK=4, WEIGHT=64))
    assert context.module_index == {"embed": 0, "layers.0.q": 1, "head": 2}
    context.begin(ATTENTION, SEGMENTS, SEGMENTS, (slot for slot in [1]))
    assert sorted(context.active) == sorted(context.replaced) == [2]
    context.begin(ATTENTION, SEGMENTS, None, [0, 1])
    assert sorted(context.active) == [1, 2]
    assert sorted(context.replaced) == [2]


def test_a_base_step_forgets_the_adapters_of_the_step_before() -> None:
    context = StepContext(NAMES, "head")
    context.table = AdapterTable(NAMES, 1)
    context.table.set(0, 1, record(RANK=2))
    context.begin(ATTENTION, SEGMENTS, SEGMENTS, [0])
    context.begin(ATTENTION)
    assert context.segments is None
    assert context.head_segments is None
    assert context.active == context.replaced == frozenset()

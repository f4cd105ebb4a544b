"""The table of adapter records and the switch that says which modules a step touches."""

import pytest
import torch

from kernels.segments import FORM_FIELDS, GATE_FIELDS, RECORD_FIELDS, Field, FormField, GateField, Limits, Segments
from server.model.step_context import AdapterTable, AttentionMetadata, Special, StepContext
from server.model.virtual_tokens import ContextPlace, VirtualRows

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
    assert table.touched(range(4)) == frozenset()
    assert table.special(range(4)) == {}
    assert not table.gates.any()
    assert not table.forms.any()


def test_set_and_clear_one_slot() -> None:
    table = AdapterTable(NAMES, 3)
    address = table.records.data_ptr()
    table.set(1, 0, record(RANK=8, A=0, B=64, D=128))
    table.set(1, 2, record(WEIGHT=256))
    table.set(2, 1, record(BIAS=512))
    assert table.records[0, 1].tolist() == record(RANK=8, A=0, B=64, D=128)
    assert sorted(table.touched([1])) == [0]
    assert table.special([1]) == {2: Special(replaced=True)}
    assert sorted(table.touched([1, 2])) == [0, 1]
    assert not table.special([0, 2])
    table.clear(1)
    assert table.records[:, 1].tolist() == [record()] * 3
    assert sorted(table.touched([1, 2])) == [1]
    assert not table.special([1, 2])
    assert table.records.data_ptr() == address


def test_an_adapter_is_written_whole_over_the_one_before() -> None:
    table = AdapterTable(NAMES, 2)
    address = table.records.data_ptr()
    table.write(0, {0: record(RANK=4, A=64), 2: record(WEIGHT=128)})
    table.write(1, {1: record(BIAS=0)})
    table.write(0, {1: record(RANK=2, A=32)})
    assert table.records[:, 0].tolist() == [record(), record(RANK=2, A=32), record()]
    assert table.records[:, 1].tolist() == [record(), record(BIAS=0), record()]
    assert (sorted(table.touched([0])), table.special([0])) == ([1], {})
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
    assert sorted(context.active) == sorted(context.special) == [2]
    context.begin(ATTENTION, SEGMENTS, None, [0, 1])
    assert sorted(context.active) == [1, 2]
    assert context.special == {2: Special(replaced=True)}


def test_a_base_step_forgets_the_adapters_of_the_step_before() -> None:
    context = StepContext(NAMES, "head")
    context.table = AdapterTable(NAMES, 1)
    context.table.set(0, 1, record(RANK=2))
    context.begin(ATTENTION, SEGMENTS, SEGMENTS, [0])
    context.begin(ATTENTION)
    assert context.segments is None
    assert context.head_segments is None
    assert (context.active, context.special) == (frozenset(), {})


def form(**fields: int) -> list[int]:
    values = [0] * FORM_FIELDS
    for name, value in fields.items():
        values[FormField[name]] = value
    return values


GATE = [0] * GATE_FIELDS
GATE[GateField.ROWS] = 2


def test_what_a_module_needs_is_that_of_all_adapters_of_the_step() -> None:
    table = AdapterTable(NAMES, 3)
    addresses = [tensor.data_ptr() for tensor in (table.records, table.gates, table.forms)]
    table.write(0, {1: record(RANK=2)}, {1: GATE}, {2: form(SPARSE_ROWS=4, SCALE_STRIDE=1)})
    table.write(1, {2: record(WEIGHT=64)}, {}, {2: form(DENSE_ROWS=4), 0: form(TRANSFORM_SIZE=4)})
    table.write(2, {1: record(RANK=2)})
    assert table.special([2]) == {}
    assert table.special([0, 2]) == {1: Special(gated=True), 2: Special(sparse=True, scaled=True)}
    every = Special(replaced=True, sparse=True, dense=True, scaled=True)
    assert table.special([0, 1]) == {1: Special(gated=True), 2: every, 0: Special(transformed=True)}
    assert table.gates[:, 0].tolist() == [[0] * GATE_FIELDS, GATE, [0] * GATE_FIELDS]
    assert table.forms[2, 1].tolist() == form(DENSE_ROWS=4)
    table.write(0, {1: record(RANK=2)})
    assert table.special([0]) == {}
    assert not table.gates[:, 0].any()
    assert not table.forms[:, 0].any()
    assert table.forms[2, 1].tolist() == form(DENSE_ROWS=4)
    assert addresses == [tensor.data_ptr() for tensor in (table.records, table.gates, table.forms)]


def test_kinds_are_those_of_factors_and_routers_that_were_ever_here() -> None:
    """A router keeps the type of its file, whatever the factors have: without its bit a kernel would misread it."""
    table, gate = AdapterTable(NAMES, 3), list(GATE)
    assert table.kinds(8) == Limits(8, 0, False)
    gate[GateField.DTYPE] = 2
    table.write(0, {1: record(RANK=2, DTYPE=1)}, {1: gate})
    assert table.kinds(8) == Limits(8, 0b110, False)
    table.write(1, {}, {1: [0] * GATE_FIELDS})
    table.clear(0)
    table.set(2, 0, record(RANK=2, DTYPE=3, CORE=64))
    assert table.kinds(8) == Limits(8, 0b1110, True)
    assert table.known == {0, 1}


def test_only_a_step_with_special_modules_inside_the_layers_leaves_the_compiled_code() -> None:
    context = StepContext(NAMES, "head")
    context.table, context.pool = AdapterTable(NAMES, 3), torch.zeros(64, dtype=torch.uint8)
    context.compiled = frozenset({1})
    context.table.write(0, {1: record(RANK=2)})
    context.table.write(1, {}, {}, {1: form(SCALE_STRIDE=1)})
    context.table.write(2, {}, {}, {2: form(SCALE_STRIDE=1)})
    steps = {}
    for slot in range(3):
        context.begin(ATTENTION, SEGMENTS, SEGMENTS, [slot])
        steps[slot] = context.compiled_step
    assert steps[0] is not None
    assert steps[0].with_adapters
    assert steps[1] is None
    assert steps[2] is not None, "the head is no part of a layer"
    assert not steps[2].with_adapters


EMBEDDINGS = ContextPlace(3, torch.float32, (64,))
PREFIX = ContextPlace(3, torch.float32, (64, 128, 192, 256))


def test_the_virtual_tokens_of_a_slot_leave_with_its_adapter() -> None:
    table = AdapterTable(NAMES, 2)
    assert table.context(0) is None
    table.write(0, {}, context=PREFIX)
    table.write(1, {1: record(RANK=2, A=32)})
    assert (table.context(0), table.context(1)) == (PREFIX, None)
    table.write(0, {1: record(RANK=2, A=32)})
    assert table.context(0) is None


def test_only_keys_and_values_keep_a_step_from_compiled_layers() -> None:
    """Embeddings are exchanged before the layers; a step says nothing of the one before it."""
    context = StepContext(NAMES, "head", embeds=True, compiled=frozenset({1}))
    embedded, prefixed = VirtualRows(EMBEDDINGS, 0, 0, 3), VirtualRows(PREFIX, 3, 0, 3)
    for virtual, expected, compiled in (
        ([embedded], ((embedded,), ()), True),
        ([embedded, prefixed], ((embedded,), (prefixed,)), False),
        ([], ((), ()), True),
    ):
        context.begin(ATTENTION, SEGMENTS, None, [0], virtual)
        assert (context.embedded, context.prefixed) == expected
        assert (context.compiled_step is not None) == compiled


def test_a_base_without_an_embedding_first_refuses_embeddings() -> None:
    with pytest.raises(RuntimeError, match="first layer"):
        StepContext(NAMES, "head").begin(ATTENTION, SEGMENTS, None, [0], [VirtualRows(EMBEDDINGS, 0, 0, 3)])


def test_rows_are_exchanged_for_those_of_the_pool() -> None:
    pool = torch.zeros(1024, dtype=torch.uint8)
    given = torch.randn(5, 2, 4).to(torch.bfloat16)
    pool[128 : 128 + given.numel() * 2] = given.reshape(-1).view(torch.uint8)
    states = torch.randn(7, 2, 4)
    expected = states.clone()
    expected[3:6] = given[1:4].float()
    VirtualRows(ContextPlace(5, torch.bfloat16, (64, 128)), 3, 1, 3).exchange(states, pool, 1)
    assert torch.equal(states, expected)

"""How an adapter lies in memory, and that it arrives so in the device's buffer."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.compression import int4
from adapters_store.errors import AdapterInvalid
from adapters_store.forms import (
    AdapterWeights,
    Context,
    Dense,
    Form,
    GatedLowRank,
    InputTransform,
    LowRank,
    OutputScale,
    ReplacedWeight,
    SharedBasis,
    SignRows,
    Sparse,
)
from kernels.segments import ALIGNMENT, FACTOR_DTYPES, INT4, ONE_BIT, Field, FormField, GateField
from server.engine.adapter_pool import Placement
from server.engine.adapter_storage import AdapterStorage
from server.engine.packing import SPAN, PackedAdapter, pack
from server.model.step_context import AdapterTable

PAGE = 512


def packed(
    modules: Mapping[str, Form | tuple[Form, ...]], page_bytes: int = PAGE, embeddings: tuple[str, ...] = ()
) -> PackedAdapter:
    forms = {name: form if isinstance(form, tuple) else (form,) for name, form in modules.items()}
    return pack(AdapterWeights("x", forms), frozenset(embeddings), page_bytes)


def piece(
    adapter: PackedAdapter, name: str, column: Field | GateField | FormField, dtype: torch.dtype, count: int
) -> list[float]:
    """The first `count` numbers of what a record points at."""
    tables = {Field: adapter.records, GateField: adapter.gates, FormField: adapter.forms}
    number, start = divmod(tables[type(column)][name][column], SPAN)
    assert start % ALIGNMENT == 0
    block = adapter.blocks[number]
    values: list[float] = block[start : start + count * dtype.itemsize].view(dtype).tolist()
    assert len(values) == count
    return values


def lowrank(rank: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank(torch.randn(rank, inputs).to(dtype), torch.randn(outputs, rank).to(dtype), torch.randn(rank))


class TestForms:
    def test_pieces_lie_as_the_kernels_read_them(self) -> None:
        a, b, d = torch.arange(6.0).view(2, 3), torch.arange(8.0).view(4, 2), torch.tensor([0.5, 2.0])
        adapter = packed({"m": LowRank(a, b, d, torch.ones(4))})
        record = adapter.records["m"]
        assert (record[Field.RANK], record[Field.DTYPE], record[Field.WEIGHT]) == (2, 0, -1)
        for column, expected in ((Field.A, a), (Field.B, b.T), (Field.D, d), (Field.BIAS, torch.ones(4))):
            assert piece(adapter, "m", column, torch.float32, expected.numel()) == expected.flatten().tolist()
        assert adapter.sizes == [4 * ALIGNMENT]

    def test_an_embedding_lies_by_token(self) -> None:
        form = lowrank(2, 3, 4)
        adapter = packed({"e": form}, embeddings=("e",))
        assert piece(adapter, "e", Field.A, torch.float32, 6) == form.a.T.flatten().tolist()

    def test_eight_bits_stay_eight_bits(self) -> None:
        a, b = torch.arange(6, dtype=torch.int8).view(2, 3), torch.arange(8, dtype=torch.int8).view(4, 2)
        adapter = packed({"m": LowRank(a, b, torch.ones(2))})
        assert FACTOR_DTYPES[adapter.records["m"][Field.DTYPE]] == torch.int8
        assert piece(adapter, "m", Field.B, torch.int8, 8) == b.T.flatten().tolist()

    def test_four_bits_lie_as_they_are_stored(self) -> None:
        a, b = torch.arange(96.0).view(2, 48) - 40, torch.arange(8.0).view(4, 2) - 3
        form, _ = int4.quantized(LowRank(a, b, torch.ones(2)))
        adapter = packed({"m": form})
        record = adapter.records["m"]
        assert (record[Field.RANK], record[Field.DTYPE], record[Field.CORE]) == (2, INT4, -1)
        for column, rows in ((Field.A, form.a), (Field.B, form.b)):
            expected = [*rows.numbers.flatten().tolist(), *rows.scales.flatten().tolist()]
            assert piece(adapter, "m", column, torch.uint8, rows.bytes) == expected

    @pytest.mark.parametrize("name", ["m", "e"])
    def test_a_shared_basis_is_a_delta_with_a_core(self, name: str) -> None:
        u, v = torch.arange(8.0).view(4, 2), torch.arange(6.0).view(2, 3)
        core = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        full = packed({name: SharedBasis(u, v, core)}, embeddings=("e",))
        expected = {Field.A: v.T if name == "e" else v, Field.B: u.T, Field.D: torch.ones(2), Field.CORE: core.T}
        for column, values in expected.items():
            assert piece(full, name, column, torch.float32, values.numel()) == values.flatten().tolist()
        diagonal = packed({name: SharedBasis(u, v, core[0])}, embeddings=("e",))
        assert diagonal.records[name][Field.CORE] == -1
        assert piece(diagonal, name, Field.D, torch.float32, 2) == [1.0, 2.0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_factors_keep_their_type_and_scales_are_float32(self, dtype: torch.dtype) -> None:
        form, weight = lowrank(2, 3, 4, dtype), torch.randn(4, 3).to(dtype)
        adapter = packed({"m": (form, ReplacedWeight(weight))})
        assert piece(adapter, "m", Field.A, dtype, 6) == form.a.flatten().tolist()
        assert piece(adapter, "m", Field.D, torch.float32, 2) == form.d.tolist()
        assert piece(adapter, "m", Field.WEIGHT, dtype, 12) == weight.flatten().tolist()


class TestOtherForms:
    def test_a_gate_lies_beside_its_low_rank_part(self) -> None:
        part = lowrank(4, 3, 5)
        router, bias = torch.randn(2, 3).bfloat16(), torch.randn(4)
        adapter = packed({"m": GatedLowRank(part.a, part.b, part.d, router, bias, 3), "n": part})
        assert adapter.records["m"][Field.RANK] == 4
        assert piece(adapter, "m", Field.A, torch.float32, 12) == part.a.flatten().tolist()
        assert list(adapter.gates) == ["m"]
        facts = {GateField.ROWS: 2, GateField.DTYPE: 1, GateField.RANK: 4, GateField.ACTIVE: 3}
        assert {column: adapter.gates["m"][column] for column in facts} == facts
        assert piece(adapter, "m", GateField.ROUTER, torch.bfloat16, 6) == router.flatten().tolist()
        assert piece(adapter, "m", GateField.BIAS, torch.float32, 4) == bias.tolist()
        assert packed({"m": GatedLowRank(part.a, part.b, part.d, router, None, 3)}).gates["m"][GateField.BIAS] == -1

    def test_all_forms_of_a_module_lie_in_one_record(self) -> None:
        start, column = torch.tensor([0, 1, 1, 3], dtype=torch.int32), torch.tensor([2, 0, 4], dtype=torch.int32)
        value, weight, scale = torch.randn(3), torch.randint(-9, 9, (3, 5), dtype=torch.int8), torch.randn(3)
        blocks = torch.randn(1, 5, 5)
        forms = (Sparse(start, column, value), Dense(weight, scale), InputTransform(blocks), OutputScale(scale))
        adapter = packed({"m": forms, "n": lowrank(1, 2, 2)})
        assert list(adapter.forms) == ["m"]
        assert list(adapter.records) == ["n"]
        record = adapter.forms["m"]
        facts = {FormField.SPARSE_ROWS: 3, FormField.SPARSE_COUNT: 3, FormField.DENSE_DTYPE: 3, FormField.DENSE_ROWS: 3}
        facts |= {FormField.TRANSFORM_SIZE: 5, FormField.SCALE_STRIDE: 1}
        facts |= {FormField.SCALE_BIAS: -1, FormField.SCALE_PAIR: -1}
        assert {column: record[column] for column in facts} == facts
        for at, tensor in (
            (FormField.SPARSE_START, start),
            (FormField.SPARSE_COLUMN, column),
            (FormField.SPARSE_VALUE, value),
            (FormField.DENSE, weight),
            (FormField.DENSE_SCALE, scale),
            (FormField.TRANSFORM, blocks.mT),
            (FormField.SCALE, scale),
        ):
            assert piece(adapter, "m", at, tensor.dtype, tensor.numel()) == tensor.flatten().tolist()

    def test_signs_take_a_bit_each(self) -> None:
        bits = torch.randint(0, 256, (3, 2), dtype=torch.uint8)
        adapter = packed({"m": Dense(SignRows(bits, 11), torch.ones(3))})
        assert adapter.forms["m"][FormField.DENSE_DTYPE] == ONE_BIT
        assert adapter.forms["m"][FormField.DENSE_ROWS] == 3
        assert piece(adapter, "m", FormField.DENSE, torch.uint8, 6) == bits.flatten().tolist()

    def test_pairs_keep_their_stride(self) -> None:
        bias, pair = torch.randn(8), torch.randn(8)
        adapter = packed({"m": OutputScale(bias=bias, pair=pair, stride=4)})
        record = adapter.forms["m"]
        assert (record[FormField.SCALE], record[FormField.SCALE_STRIDE]) == (-1, 4)
        assert piece(adapter, "m", FormField.SCALE_BIAS, torch.float32, 8) == bias.tolist()
        assert piece(adapter, "m", FormField.SCALE_PAIR, torch.float32, 8) == pair.tolist()

    def test_a_sparse_delta_of_no_numbers_takes_no_place(self) -> None:
        empty = torch.zeros(0)
        form = Sparse(torch.zeros(4, dtype=torch.int32), empty.int(), empty)
        assert packed({"m": form}).forms == {}

    def test_what_has_no_room_in_the_records_is_refused(self) -> None:
        part = lowrank(4, 3, 5)
        gated = GatedLowRank(part.a, part.b, part.d, torch.randn(2, 3), None, 3)
        for forms in ((part, gated), (OutputScale(), OutputScale()), (part, ReplacedWeight(torch.randn(5, 3).half()))):
            with pytest.raises(AdapterInvalid) as caught:
                packed({"m": forms})
            assert caught.value.code == "feature_unsupported"


class TestBlocks:
    def test_small_pieces_share_a_block_of_at_most_a_page(self) -> None:
        adapter = packed({f"m{index}": lowrank(2, 16, 16) for index in range(10)}, 1024)
        assert max(adapter.sizes) <= 1024
        assert len(adapter.sizes) < 10
        assert adapter.num_bytes == 10 * (128 + 128 + 64)

    def test_a_piece_larger_than_a_page_is_a_block_by_itself(self) -> None:
        form = lowrank(2, 200, 4)
        adapter = packed({"m": form})
        assert sorted(adapter.sizes) == [128, 1600]
        assert piece(adapter, "m", Field.A, torch.float32, 400) == form.a.flatten().tolist()

    def test_a_basis_is_a_part_of_its_own_with_an_equal_key_for_equal_bytes(self) -> None:
        u, v = torch.randn(4, 2), torch.randn(2, 3)
        one, other = packed({"m": SharedBasis(u, v, torch.ones(2))}), packed({"m": SharedBasis(u, v, torch.eye(2))})
        assert list(one.shared) == list(other.shared)
        assert one.sizes != other.sizes, "the core of one is a diagonal"
        for changed in (SharedBasis(u, v + 1, torch.ones(2)), SharedBasis(u - 1, v, torch.ones(2))):
            assert list(packed({"m": changed}).shared) != list(one.shared)

    def test_without_a_basis_nothing_is_shared(self) -> None:
        assert packed({"m": lowrank(2, 3, 4)}).shared == {}

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        st.lists(st.tuples(st.integers(1, 5), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8),
        st.sampled_from([64, 256, 1024, 1 << 16]),
    )
    def test_no_two_pieces_overlap(self, shapes: list[tuple[int, int, int]], page_bytes: int) -> None:
        forms = {f"m{index}": lowrank(*shape) for index, shape in enumerate(shapes)}
        adapter = packed(forms, page_bytes)
        for name, form in forms.items():
            assert piece(adapter, name, Field.A, torch.float32, form.a.numel()) == form.a.flatten().tolist()
            assert piece(adapter, name, Field.B, torch.float32, form.b.numel()) == form.b.T.flatten().tolist()
            assert piece(adapter, name, Field.D, torch.float32, form.rank) == form.d.tolist()


class TestStorage:
    def test_a_slot_used_again_keeps_nothing_of_the_adapter_before(self) -> None:
        table = AdapterTable(["m", "n"], slots=2)
        buffer = torch.zeros(2048, dtype=torch.uint8)
        storage = AdapterStorage(buffer, table)
        form = LowRank(torch.full((1, 3), 5.0), torch.full((4, 1), 6.0), torch.ones(1))
        storage.write(Placement(1, (512,), (1,)), packed({"m": form, "n": form}))
        assert table.touched([1]) == {0, 1}
        storage.write(Placement(1, (1024,), (2,)), packed({"n": form}))
        assert table.touched([1]) == {1}
        assert int(table.records[0, 1, Field.A]) == -1
        record = table.records[1, 1]
        for column, expected in ((Field.A, [5.0] * 3), (Field.B, [6.0] * 4), (Field.D, [1.0])):
            start = int(record[column])
            assert 1024 <= start < 1536
            assert buffer[start : start + 4 * len(expected)].view(torch.float32).tolist() == expected
        assert table.touched([0]) == frozenset()

    def test_offsets_of_all_tables_are_those_of_the_buffer(self) -> None:
        table = AdapterTable(["m", "n"], slots=2)
        buffer = torch.zeros(4096, dtype=torch.uint8)
        storage = AdapterStorage(buffer, table)
        part, router, scale = lowrank(2, 3, 4), torch.randn(1, 3), torch.randn(4)
        gated = GatedLowRank(part.a, part.b, part.d, router, None, 1)
        adapter = packed({"m": gated, "n": OutputScale(scale)})
        offsets = tuple(1024 + PAGE * index for index in range(len(adapter.sizes)))
        storage.write(Placement(1, offsets, (2,)), adapter)
        for table_of, column, tensor in (
            (table.records[0], Field.A, part.a),
            (table.gates[0], GateField.ROUTER, router),
            (table.forms[1], FormField.SCALE, scale),
        ):
            start = int(table_of[1, column])
            found = buffer[start : start + tensor.nbytes].view(torch.float32)
            assert start >= 1024
            assert torch.equal(found, tensor.flatten())
        assert table.special([1]).keys() == {0, 1}

    def test_a_shared_part_is_written_only_where_it_is_fresh(self) -> None:
        table = AdapterTable(["m"], slots=2)
        buffer = torch.zeros(2048, dtype=torch.uint8)
        storage = AdapterStorage(buffer, table)
        basis = SharedBasis(torch.full((4, 2), 7.0), torch.full((2, 3), 8.0), torch.ones(2))
        adapter = packed({"m": basis})
        [key] = adapter.shared
        storage.write(Placement(0, (0, 512), (0,), (key,), frozenset({key})), adapter)
        assert buffer[512:536].view(torch.float32).tolist() in ([7.0] * 6, [8.0] * 6)
        buffer[512:1024] = 0
        storage.write(Placement(1, (1024, 512), (2,), (key,)), adapter)
        assert not buffer[512:1024].any(), "it lies there already for another adapter"
        shared = [Field.A, Field.B]
        assert table.records[0, 0, shared].tolist() == table.records[0, 1, shared].tolist()

    def test_what_is_on_its_way_is_said(self) -> None:
        class Slow:
            def copy(self, pairs: object) -> "Slow":
                return self

            def done(self) -> bool:
                return False

            def wait(self) -> None: ...

        slow = Slow()
        storage = AdapterStorage(torch.zeros(512, dtype=torch.uint8), AdapterTable(["m"], slots=1), slow)
        assert storage.write(Placement(0, (0,), (0,)), packed({"m": lowrank(1, 3, 4)})) is slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_virtual_tokens_arrive_beside_other_forms(dtype: torch.dtype) -> None:
    """Embeddings in one piece, keys and values layer by layer; a piece larger than a page has a block of its own."""
    embeddings, keys, values = (torch.randn(shape).to(dtype) for shape in ((6, 8), (3, 40, 2, 4), (3, 40, 2, 4)))
    delta = LowRank(torch.randn(2, 8), torch.randn(8, 2), torch.ones(2))
    for context, expected in (
        (Context(embeddings), [embeddings]),
        (Context(keys=keys, values=values), [part for pair in zip(keys, values, strict=True) for part in pair]),
    ):
        adapter = pack(AdapterWeights("x", {"a": (delta,)}, context), frozenset(), PAGE)
        assert max(adapter.sizes) <= max(PAGE, 40 * 2 * 4 * dtype.itemsize)
        buffer, table = torch.zeros(1 << 16, dtype=torch.uint8), AdapterTable(("a",), 2)
        offsets, end = [], 64
        for size in adapter.sizes:
            offsets.append(end)
            end += size
        AdapterStorage(buffer, table).write(Placement(1, tuple(offsets), ()), adapter)
        place = table.context(1)
        assert place is not None
        assert (place.num_tokens, place.dtype, place.is_prefix) == (len(expected[0]), dtype, len(expected) > 1)
        for offset, part in zip(place.offsets, expected, strict=True):
            assert torch.equal(
                buffer[offset : offset + part.numel() * part.itemsize].view(dtype).view(part.shape), part
            )

"""Decode steps on buffers of fixed size: padding, which step a graph may take, and the same answers as without.

On a CPU a graph is stood for by the function that it would be captured from; the last tests need a GPU.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from adapters_store.forms import AdapterWeights, LowRank
from kernels import dispatch, reference
from kernels.segments import RECORD_FIELDS, Field, Limits, Segments
from server.engine.build import build_core
from server.engine.decode_graphs import Compute, DecodeGraphs, sizes
from server.engine.decode_inputs import DecodeInputs, DecodeShape, DecodeStep
from server.engine.limits import BLOCK_SIZE
from server.engine.packing import pack
from server.engine.tokenizer import Tokenizer
from server.model.loader import describe
from tests.engine.test_model_runner import LIMITS, MIXES, Bench, adapter, assert_likely, prompt
from tests.support.models import tiny_model, tiny_tokenizer

SHAPE = DecodeShape(width=7, block_size=BLOCK_SIZE, rank=256)
CPU = torch.device("cpu")


def segments(slots: list[int], tokens: list[list[int]]) -> Segments:
    flat = [token for group in tokens for token in group]
    return Segments(
        slot=torch.tensor(slots, dtype=torch.int32),
        start=torch.tensor([0, *(len(group) for group in tokens)]).cumsum(0).to(torch.int32),
        token=torch.tensor(flat, dtype=torch.int32),
        weight=torch.arange(1.0, len(flat) + 1),
    )


def test_sizes_double_and_end_with_the_most() -> None:
    assert sizes(1) == (1,)
    assert sizes(8) == (1, 2, 4, 8)
    assert sizes(24) == (1, 2, 4, 8, 16, 24)


class TestInputs:
    def test_rows_of_padding_have_no_request_and_store_nothing(self) -> None:
        inputs = DecodeInputs(4, SHAPE, Limits(), CPU)
        inputs.fill(DecodeStep([7, 8], [33, 0], [[5, 2, 9], [4]], None))
        assert inputs.tokens.tolist() == [7, 8, 0, 0]
        assert inputs.positions.tolist() == [33, 0, 0, 0]
        assert inputs.attention.slots.tolist() == [9 * BLOCK_SIZE + 1, 4 * BLOCK_SIZE, -1, -1]
        assert inputs.attention.query_start.tolist() == [0, 1, 2, 2, 2]
        assert inputs.attention.kv_length.tolist() == [34, 1, 0, 0]
        assert inputs.attention.block_table[:2, :3].tolist() == [[5, 2, 9], [4, 0, 0]]

    def test_a_smaller_step_leaves_nothing_of_the_one_before_at_the_same_addresses(self) -> None:
        inputs = DecodeInputs(4, SHAPE, Limits(), CPU)
        places = [inputs.tokens, inputs.positions, inputs.segments.slot, inputs.segments.start, inputs.segments.token]
        places += [inputs.attention.slots, inputs.attention.query_start, inputs.attention.kv_length]
        before = [place.data_ptr() for place in places]
        tables = [[1], [2], [3], [4]]
        inputs.fill(DecodeStep([1, 2, 3, 4], [5, 6, 7, 8], tables, segments([0, 3], [[0, 2], [1]])))
        inputs.fill(DecodeStep([9], [3], [[6]], segments([2], [[0]])))
        assert inputs.attention.slots.tolist() == [6 * BLOCK_SIZE + 3, -1, -1, -1]
        assert inputs.attention.kv_length.tolist() == [4, 0, 0, 0]
        assert inputs.segments.slot.tolist()[:1] == [2]
        assert inputs.segments.start.tolist() == [0, 1, 1, 1, 1]
        assert inputs.segments.token.tolist()[:1] == [0]
        assert [place.data_ptr() for place in places] == before

    def test_segments_are_those_of_the_step(self) -> None:
        inputs = DecodeInputs(4, SHAPE, Limits(), CPU)
        inputs.fill(DecodeStep([1, 2], [0, 0], [[1], [2]], segments([3, 1, 2], [[0, 1], [], [0]])))
        found = inputs.segments
        assert found.slot.tolist() == [3, 2, 0, 0]
        assert found.start.tolist() == [0, 2, 3, 3, 3]
        assert found.token.tolist() == [0, 1, 0, 0]
        assert found.weight.tolist() == [1, 2, 3, 0]

    def test_more_entries_than_rows_do_not_fit(self) -> None:
        inputs = DecodeInputs(2, SHAPE, Limits(), CPU)
        with pytest.raises(ValueError, match="3 entries; 2 fit"):
            inputs.fill(DecodeStep([1], [0], [[1]], segments([0, 1, 2], [[0], [0], [0]])))


@dataclass
class Captures:
    """Counts captures and replays; `spoil` changes what a graph gives, `fail` is raised by the capture."""

    made: int = 0
    replayed: int = 0
    memories: int = 0
    spoil: float = 0.0
    fail: Exception | None = None

    def afresh(self) -> Callable[[Compute], Compute]:
        """As on a GPU, where dropped graphs take their common memory with them."""
        self.memories += 1
        mine = self.memories

        def capture(compute: Compute) -> Compute:
            assert mine == self.memories, "captured into the memory of graphs that are gone"
            return self(compute)

        return capture

    def __call__(self, compute: Compute) -> Compute:
        self.made += 1
        if self.fail is not None:
            raise self.fail

        def replay() -> torch.Tensor:
            self.replayed += 1
            return compute() + self.spoil

        return replay


@pytest.fixture
def captures() -> Captures:
    return Captures()


@pytest.fixture
def bench(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """An engine whose decodes go through graphs, with the attention of the reference, which knows rows of padding."""

    def attend(*arguments: torch.Tensor, window: int, softcap: float) -> torch.Tensor:
        query, key, value, key_pool, value_pool, slots, start, length, table, scale = arguments
        reference.write_kv(key, value, key_pool, value_pool, slots)
        return reference.paged_attention(
            query, key_pool, value_pool, start, length, table, float(scale), window, softcap
        )

    base = describe(tiny_model("qwen2"), tiny_tokenizer(), "tiny/qwen2")
    arrived = threading.Semaphore(0)
    core = build_core(base, LIMITS, adapter, arrived.release)
    assert core._runner._graphs is None, "none on a CPU"
    context = core._runner._context
    assert context.cache is not None
    context.cache.buffer.fill_(torch.nan)
    monkeypatch.setattr(dispatch, "attend", attend)
    core._runner._graphs = DecodeGraphs(base, context, LIMITS.max_running, SHAPE, lambda: captures.afresh())
    yield Bench(core, Tokenizer(base.tokenizer), arrived)
    core.close()


def graphs(bench: Bench) -> DecodeGraphs:
    found = bench.core._runner._graphs
    assert found is not None
    return found


def test_answers_are_those_of_transformers_in_every_mix(bench: Bench, captures: Captures) -> None:
    """Graphs with and without adapters, padded rows, compositions; `two` exchanges the head: those steps are eager."""
    for name, mixes in (("base", [[], [], []]), ("one", [[("one", 1.0)], [], [("one", -0.5)]]), ("all", MIXES)):
        for index, mix in enumerate(mixes):
            bench.add(f"{name}{index}", prompt(5 + 7 * index, index), adapters=mix, max_tokens=6 + index)
        bench.run()
        for index, mix in enumerate(mixes):
            assert_likely(bench, f"{name}{index}", prompt(5 + 7 * index, index), mix)
    assert captures.made >= 3
    assert captures.replayed > 2 * captures.made


def test_rows_of_padding_touch_no_page(bench: Bench) -> None:
    for index in range(3):
        bench.add(f"row{index}", prompt(4, index), max_tokens=5)
    bench.run()
    context = bench.core._runner._context
    assert context.cache is not None
    written = ~context.cache.buffer[:, 0, 0, :, 0, 0].isnan()
    assert int(written.sum()) == 3 * (4 + 4)
    assert {key[0] for key in graphs(bench)._replays} >= {4}, "three rows were padded to four"


def test_a_graph_is_captured_once_for_each_size_and_outlives_loads(bench: Bench, captures: Captures) -> None:
    for name, mix in (("a", [("one", 1.0)]), ("b", [("one", 0.5)]), ("c", [("one", 2.0)])):
        bench.add(name, prompt(6, 3), adapters=mix, max_tokens=8)
        bench.run()
        assert_likely(bench, name, prompt(6, 3), mix)
        assert captures.made == 1


def test_graphs_are_captured_anew_when_an_adapter_of_a_new_kind_comes(bench: Bench, captures: Captures) -> None:
    """A core, or factors of another type, need other kernels; what has been here already needs none."""
    table = bench.core._runner._context.table
    assert table is not None
    assert table.kinds(8) == Limits(8, factors=0, cores=False)
    bench.add("plain", prompt(6, 3), adapters=[("one", 1.0)], max_tokens=8)
    bench.run()
    assert captures.made == 1
    assert table.kinds(8) == Limits(8, factors=1, cores=False), "float32 is the first of the factors' types"
    record = [-1] * RECORD_FIELDS
    record[Field.RANK], record[Field.DTYPE], record[Field.CORE] = 2, 3, 64
    for slot in (40, 41):
        table.write(slot, {0: record})
        table.clear(slot)
        assert table.kinds(8) == Limits(8, factors=0b1001, cores=True), "also once it has gone"
        bench.add(f"after {slot}", prompt(6, 3), adapters=[("one", 1.0)], max_tokens=8)
        bench.run()
        assert_likely(bench, f"after {slot}", prompt(6, 3), [("one", 1.0)])
        assert captures.made == 2
    assert captures.memories == 1 + 2, "one for the engine, one for each set of kinds that had a step"


def test_graphs_are_captured_anew_when_an_adapter_comes_on_a_module_that_had_none(
    bench: Bench, captures: Captures
) -> None:
    context = bench.core._runner._context
    table, head = context.table, context.module_index["lm_head"]
    assert table is not None
    assert table.known == frozenset()
    bench.add("all but the head", prompt(6, 3), adapters=[("one", 1.0)], max_tokens=8)
    bench.run()
    assert len(table.known) > 20
    assert head not in table.known
    assert captures.made == 1
    record = [-1] * RECORD_FIELDS
    record[Field.RANK], record[Field.DTYPE] = 2, 0
    for slot in (40, 41):
        table.write(slot, {head: record})
        table.clear(slot)
        assert head in table.known
        bench.add(f"after {slot}", prompt(6, 3), adapters=[("one", 1.0)], max_tokens=8)
        bench.run()
        assert_likely(bench, f"after {slot}", prompt(6, 3), [("one", 1.0)])
        assert captures.made == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda captures: setattr(captures, "fail", RuntimeError("waits for the device")), "waits for the device"),
        (lambda captures: setattr(captures, "spoil", 5.0), "other logits"),
    ],
    ids=["fails", "other numbers"],
)
def test_a_model_that_cannot_be_captured_is_served_eagerly(
    bench: Bench,
    captures: Captures,
    change: Callable[[Captures], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(captures)
    bench.add("eager", prompt(6, 4), adapters=[("one", 1.0)], max_tokens=8)
    bench.run()
    assert_likely(bench, "eager", prompt(6, 4), [("one", 1.0)])
    assert captures.made == 1
    [record] = [record for record in caplog.records if record.message == "decode_not_captured"]
    assert reason in record.__dict__["reason"]


def test_a_step_takes_the_smallest_size_that_holds_its_rows_and_its_entries(bench: Bench) -> None:
    assert [graphs(bench).size(rows, entries) for rows, entries in ((1, 0), (3, 3), (3, 5), (8, 8))] == [1, 4, 8, 8]
    assert graphs(bench).size(9, 0) is None
    assert graphs(bench).size(5, 9) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_on_a_gpu_answer_as_transformers_does(caplog: pytest.LogCaptureFixture) -> None:
    base = describe(copy.deepcopy(tiny_model("qwen2")).cuda(), tiny_tokenizer(), "tiny/qwen2")
    arrived = threading.Semaphore(0)
    core = build_core(base, LIMITS, adapter, arrived.release)
    bench = Bench(core, Tokenizer(base.tokenizer), arrived)
    try:
        for name in ("first", "again"):
            for index, mix in enumerate(MIXES):
                bench.add(f"{name}{index}", prompt(5 + 7 * index, index), adapters=mix, max_tokens=12)
                bench.run()
                assert_likely(bench, f"{name}{index}", prompt(5 + 7 * index, index), mix)
    finally:
        core.close()
    assert graphs(bench)._usable, [record.__dict__.get("reason") for record in caplog.records]
    assert any(replay is not None for replay in graphs(bench)._replays.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_blocks_are_pinned_for_a_gpu() -> None:
    weights = AdapterWeights("x", {"m": (LowRank(torch.randn(2, 3), torch.randn(4, 2), torch.ones(2)),)})
    plain, pinned = pack(weights, frozenset(), 512), pack(weights, frozenset(), 512, pinned=True)
    assert all(block.is_pinned() for block in pinned.blocks)
    assert all(torch.equal(a, b) for a, b in zip(plain.blocks, pinned.blocks, strict=True))

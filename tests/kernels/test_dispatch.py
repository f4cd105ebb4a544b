"""The door: same answers and same refusals from the C++ kernels and from the reference."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import dispatch, reference
from kernels.segments import INT4, Field, Segments
from tests.kernels.support import Group, lowrank_adapter, pack, paged, segments_of


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr(dispatch, "_cpu_loaded", False)
    return str(request.param)


def test_load_names_what_will_run(backend: str) -> None:
    assert dispatch.load() == backend
    assert dispatch.load(torch.device("cpu")) == backend


@pytest.mark.parametrize(("found", "name"), [(True, "triton"), (False, "reference")])
def test_a_gpu_takes_triton_where_it_is_installed(found: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_gpu_found", found)
    assert dispatch.load("cuda") == name
    assert dispatch.load(torch.device("cuda", 1)) == name
    assert dispatch.load("meta") == "reference"


def step() -> dict[str, Any]:
    pool, records = pack([lowrank_adapter(4, 8, 6, torch.float32) for _ in range(2)])
    return {
        "y": torch.randn(3, 6),
        "x": torch.randn(3, 8),
        "pool": pool,
        "records": records,
        "segments": segments_of(Group(0, [0, 1]), Group(1, [2])),
    }


def with_segments(**changes: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        old = arguments["segments"]
        fields = {"slot": old.slot, "start": old.start, "token": old.token, "weight": old.weight}
        arguments["segments"] = Segments(**{**fields, **changes})

    return change


def with_argument(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update({name: value})


def with_record(field: Field, value: int) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["records"][:, field] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_argument("x", torch.randn(4, 8)), r"\[3, 6\] and \[4, 8\]"),
        (with_argument("y", torch.zeros(3, 6, dtype=torch.int32)), "y is"),
        (with_argument("pool", torch.zeros(64)), "pool"),
        (with_argument("records", torch.zeros(2, 5, dtype=torch.int64)), "records"),
        (with_segments(slot=torch.tensor([0, 9], dtype=torch.int32)), "slot"),
        (with_segments(slot=torch.tensor([0, -1], dtype=torch.int32)), "slot"),
        (with_segments(token=torch.tensor([0, 1, 3], dtype=torch.int32)), "token"),
        (with_segments(start=torch.tensor([0, 2, 9], dtype=torch.int32)), "segment"),
        (with_segments(weight=torch.ones(2)), "weight"),
        (with_record(Field.DTYPE, 7), "factor type"),
        (with_record(Field.A, 10**9), "outside the pool"),
        (with_record(Field.CORE, 10**9), "CORE at 1000000000 of 64 bytes lies outside the pool"),
        (with_record(Field.RANK, -3), "rank -3 is negative"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    backend: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    arguments = step()
    change(arguments)
    before = arguments["y"].clone()
    with pytest.raises(ValueError, match=message):
        dispatch.lowrank(**arguments)
    assert torch.equal(arguments["y"], before)


def test_a_replacement_outside_the_pool_is_refused(backend: str) -> None:
    arguments = step()
    arguments["records"][:, Field.WEIGHT] = 10**9
    before = arguments["y"].clone()
    with pytest.raises(ValueError, match="WEIGHT at 1000000000 of 192 bytes lies outside the pool"):
        dispatch.replace_weight(**arguments)
    assert torch.equal(arguments["y"], before)


def test_four_bits_are_refused_where_they_cannot_be(backend: str) -> None:
    arguments = step()
    arguments["records"][:, Field.DTYPE], arguments["records"][:, Field.WEIGHT] = INT4, 0
    before = arguments["y"].clone()
    with pytest.raises(ValueError, match="replacement weight of 4-bit numbers"):
        dispatch.replace_weight(**arguments)
    del arguments["x"]
    with pytest.raises(ValueError, match="embedding's A of 4-bit numbers"):
        dispatch.lowrank_embedding(**arguments, ids=torch.zeros(3, dtype=torch.int64))
    assert torch.equal(arguments["y"], before)


@pytest.mark.parametrize(
    ("ids", "message"),
    [(torch.zeros(2, dtype=torch.int64), r"\[3, 6\]"), (torch.zeros(3, dtype=torch.int32), "int64 ids")],
)
def test_wrong_ids_are_refused(backend: str, ids: torch.Tensor, message: str) -> None:
    arguments = step()
    del arguments["x"]
    with pytest.raises(ValueError, match=message):
        dispatch.lowrank_embedding(**arguments, ids=ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.randn(3, 7, 64)),
        ("query", torch.randn(3, 9, 32)),
        ("query", torch.randn(2, 9, 64)),
        ("value_pool", torch.randn(4, 16, 3, 32)),
        ("query_start", torch.tensor([0, 1], dtype=torch.int32)),
        ("query_start", torch.tensor([0, 2, 3])),
        ("query_start", torch.tensor([0, 5, 3], dtype=torch.int32)),
        ("kv_length", torch.tensor([1, 20], dtype=torch.int32)),
        ("kv_length", torch.tensor([20, 90], dtype=torch.int32)),
        ("block_table", torch.zeros(1, 2, dtype=torch.int32)),
        ("block_table", torch.full((2, 2), 99, dtype=torch.int32)),
    ],
)
def test_wrong_attention_arguments_are_refused(backend: str, name: str, value: torch.Tensor) -> None:
    world = paged([20, 20], [2, 1])
    setattr(world, name, value)
    with pytest.raises(ValueError, match=r"\d"):
        dispatch.paged_attention(*world.arguments(), world.scale)


@pytest.mark.parametrize(
    ("slots", "tokens"), [([64], 1), ([-1], 1), ([0, 1], 1), ([0], 2)], ids=["beyond", "negative", "many", "few"]
)
def test_wrong_slots_are_refused(backend: str, slots: list[int], tokens: int) -> None:
    key, pool = torch.randn(tokens, 3, 8), torch.zeros(4, 16, 3, 8)
    with pytest.raises(ValueError, match=r"\d"):
        dispatch.write_kv(key, key, pool, pool.clone(), torch.tensor(slots))
    assert not pool.any()


def test_a_group_is_its_modules_one_by_one(backend: str) -> None:
    arguments = step()
    pool, records = pack([lowrank_adapter(4, 8, outer, torch.float32) for outer in (6, 6, 9, 9)])
    ys = [torch.randn(3, 6), torch.randn(3, 9)]
    tables = [records[:2], records[2:]]
    expected = [
        dispatch.lowrank(y.clone(), arguments["x"], pool, table, arguments["segments"])
        for y, table in zip(ys, tables, strict=True)
    ]
    dispatch.lowrank_group(ys, arguments["x"], pool, tables, arguments["segments"])
    assert all(torch.equal(y, wanted) for y, wanted in zip(ys, expected, strict=True))
    for several in ([], ys * 2):
        with pytest.raises(ValueError, match="1 to 3 of both"):
            dispatch.lowrank_group(several, arguments["x"], pool, tables, arguments["segments"])


def test_gated_adapters(backend: str) -> None:
    arguments = step()
    records = arguments["records"]
    gates = torch.tensor([[int(r[Field.A]), -1, 4, 0, 4, 2, -1] for r in records])  # A itself as the router
    expected = reference.gated_lowrank(**{**arguments, "y": arguments["y"].clone()}, gates=gates)
    result = dispatch.gated_lowrank(**{**arguments, "y": arguments["y"].clone()}, gates=gates)
    torch.testing.assert_close(result, expected)
    with pytest.raises(ValueError, match="gates: int64"):
        dispatch.gated_lowrank(**arguments, gates=gates[:1])
    assert not torch.allclose(dispatch.lowrank(**arguments), expected)


def test_segments_stay_where_they_are_on_a_cpu() -> None:
    segments = step()["segments"]
    assert dispatch.place(segments, "cpu") is segments


def test_float64_takes_the_reference() -> None:
    arguments = step()
    arguments["y"], arguments["x"] = arguments["y"].double(), arguments["x"].double()
    expected = reference.lowrank(**{**arguments, "y": arguments["y"].clone()})
    assert torch.equal(dispatch.lowrank(**arguments), expected)
    world = paged([20], [2], dtype=torch.float64)
    result = dispatch.paged_attention(*world.arguments(), world.scale)
    assert result.dtype == torch.float64


def test_nothing_is_loaded_before_the_first_call() -> None:
    script = (
        "import sys, torch, kernels, kernels.dispatch; "
        "assert 'kernels.cpu.build' not in sys.modules; "
        "assert not hasattr(torch.ops.polyrank, 'lowrank_')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

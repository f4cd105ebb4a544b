"""The block tables of decode steps: whatever stood in a row before, it has the pages of the step."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.segments import Limits
from server.engine.decode_inputs import DecodeInputs, DecodeShape, DecodeStep

SIZE, WIDTH = 4, 5
SHAPE = DecodeShape(width=WIDTH, block_size=16, rank=8)
TABLE = st.lists(st.integers(0, 3), min_size=1, max_size=WIDTH)


def fill(inputs: DecodeInputs, tables: list[list[int]]) -> None:
    count = len(tables)
    inputs.fill(DecodeStep([7] * count, [len(table) * 16 - 1 for table in tables], tables, None))


def assert_there(inputs: DecodeInputs, tables: list[list[int]]) -> None:
    held = inputs.attention.block_table.tolist()
    assert [row[: len(table)] for row, table in zip(held, tables, strict=False)] == tables
    assert inputs.attention.slots.tolist() == [table[-1] * 16 + 15 for table in tables] + [-1] * (SIZE - len(tables))


@given(st.lists(st.lists(TABLE, min_size=1, max_size=SIZE), min_size=1, max_size=5))
def test_every_row_has_its_pages_at_every_step(steps: list[list[list[int]]]) -> None:
    inputs = DecodeInputs(SIZE, SHAPE, Limits(), torch.device("cpu"))
    for tables in steps:
        fill(inputs, tables)
        assert_there(inputs, tables)


def test_pages_are_seen_that_a_request_got_in_the_list_it_had() -> None:
    inputs = DecodeInputs(SIZE, SHAPE, Limits(), torch.device("cpu"))
    tables = [[1], [2, 3], [4]]
    for _ in range(WIDTH - 2):
        fill(inputs, tables)
        assert_there(inputs, tables)
        tables[0].append(9 + len(tables[0]))
        tables[1].append(20 + len(tables[1]))
    del tables[0]
    fill(inputs, tables)
    assert_there(inputs, tables)

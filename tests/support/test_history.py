"""The judge of histories lets right ones pass and finds each kind of wrong one."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.history import Operation, check

BOUND = 2.0


def line(version: int, digest: str, created: float) -> dict[str, Any]:
    moment = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
    return {"version": version, "digest": digest, "created": moment, "kind": "lora" if digest else "deleted"}


def write(server: int, start: float, version: int, digest: str, kind: str = "upload") -> Operation:
    return Operation(server, kind, "a", start, start + 0.5, version, digest, changed=True)


def read(server: int, start: float, version: int | None, digest: str = "") -> Operation:
    return Operation(server, "read", "a", start, start + 0.1, version, digest)


DELETION = Operation(1, "delete", "a", 30.0, 30.5, changed=True)
WRITES = [write(0, 10.0, 1, "x"), write(1, 20.0, 2, "y"), DELETION, write(2, 40.0, 4, "x", "rollback")]
LOG = [line(1, "x", 10.2), line(2, "y", 20.2), line(3, "", 30.2), line(4, "x", 40.2)]
READS = [
    read(1, 9.0, None),
    read(0, 10.6, 1, "x"),
    read(1, 10.6, None),  # another server, within the bound
    read(1, 12.6, 1, "x"),
    read(0, 20.1, 2, "y"),  # while it is written
    read(0, 31.0, 2, "y"),
    read(0, 33.0, None),
    read(3, 42.6, 4, "x"),
]


def test_a_right_history_passes() -> None:
    check([*WRITES, *READS], {"a": LOG}, BOUND)


@pytest.mark.parametrize(
    "wrong",
    [
        read(1, 12.6, None),  # 404 after the bound
        read(1, 22.6, 1, "x"),  # the old one after the bound
        read(1, 20.6, 1, "x"),  # the old one on the server that wrote the new one
        read(0, 19.0, 2, "y"),  # before it was written
        read(0, 33.0, 2, "y"),  # deleted
        read(0, 12.6, 1, "y"),  # content of another version
        read(2, 40.6, None),  # its own writing not seen
    ],
)
def test_a_wrong_read_is_found(wrong: Operation) -> None:
    with pytest.raises(AssertionError):
        check([*WRITES, *READS, wrong], {"a": LOG}, BOUND)


def test_a_rollback_to_what_is_current_is_a_read() -> None:
    idle = replace(write(3, 45.0, 4, "x", "rollback"), changed=False)
    check([*WRITES, idle], {"a": LOG}, BOUND)
    with pytest.raises(AssertionError, match="not between"):
        check([*WRITES, replace(idle, version=2, digest="y")], {"a": LOG}, BOUND)
    unsure = [replace(each, changed=each.kind != "rollback") for each in WRITES]
    check([*unsure, idle], {"a": LOG}, BOUND)


def test_a_server_that_goes_back_in_time_is_found() -> None:
    reads = [read(0, 20.6, 2, "y"), read(0, 20.9, 1, "x")]
    with pytest.raises(AssertionError, match="back from 2"):
        check([*WRITES, *reads], {"a": LOG}, BOUND)


def test_a_lost_write_a_gap_and_a_stranger_are_found() -> None:
    with pytest.raises(AssertionError, match="not in the log"):
        check(WRITES, {"a": LOG[:3]}, BOUND)
    with pytest.raises(AssertionError, match="gaps"):
        check(WRITES[1:], {"a": LOG[1:]}, BOUND)
    with pytest.raises(AssertionError, match="by nobody"):
        check(WRITES[:3], {"a": LOG}, BOUND)


def test_an_order_against_real_time_is_found() -> None:
    first, second = write(0, 20.0, 1, "x"), write(1, 10.0, 2, "y")
    with pytest.raises(AssertionError, match="before"):
        check([first, second], {"a": [line(1, "x", 20.2), line(2, "y", 10.2)]}, BOUND)


def test_a_write_that_was_lost_with_its_server_may_be_there_or_not() -> None:
    lost = replace(write(3, 45.0, 5, "z"), version=None, digest="", changed=False, lost=True)
    check([*WRITES, lost], {"a": LOG}, BOUND)
    check([*WRITES, lost, read(0, 46.0, 5, "z")], {"a": [*LOG, line(5, "z", 45.2)]}, BOUND)

"""`polyrank merge`."""

import json
import time

import pytest

from server.commands import waiting
from tests.cli.conftest import Polyrank
from tests.cli.fake_server import FakeServer, error

ORDER = ["merge", "both", "--method", "lego", "--from", "a", "--from", "b:0.5"]


@pytest.fixture(autouse=True)
def held(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.versions = {"a": [(b"{}", b"weights")]}
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.0)


def test_says_which_job_it_is(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.states = ["queued", "queued"]
    result = polyrank(*ORDER, "--rank", "8")
    assert (result.code, result.out) == (0, "job j1  queued\n")
    sources = [{"adapter": "a", "weight": 1.0}, {"adapter": "b", "weight": 0.5}]
    assert fake.orders == [{"name": "both", "method": "lego", "sources": sources, "parameters": {"rank": 8}}]
    assert fake.requests == ["POST /merge"]
    assert json.loads(polyrank(*ORDER, "--json").out)["id"] == "j1"


def test_waits_for_the_version(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.states = ["queued", "running", "running", "done"]
    result = polyrank(*ORDER, "--wait", "--replace")
    assert result.code == 0
    assert result.out.splitlines()[0].startswith("both@1  ")
    assert "already there" not in result.out
    assert fake.requests == ["POST /merge?replace=true", *["GET /jobs/j1"] * 3, "GET /adapters/both@1"]
    fake.states = ["done"]
    told = json.loads(polyrank(*ORDER, "--json").out)
    assert (told["name"], told["version"], told["new"]) == ("both", 2, True)


def test_the_error_of_the_job_is_told(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.states = ["running", "failed"]
    result = polyrank(*ORDER, "--wait")
    assert (result.code, result.err.strip()) == (1, "error: It is too large. (rank_limit)")
    fake.refuse = error(422, "unknown_method", "There is no merge method `lego`.")
    result = polyrank(*ORDER)
    assert (result.code, result.err.strip()) == (1, "error: There is no merge method `lego`. (unknown_method)")


def test_interrupted_it_cancels_the_job(polyrank: Polyrank, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.states = ["running", "running", "cancelled"]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert polyrank(*ORDER, "--wait").code == 130
    assert fake.requests == ["POST /merge", "DELETE /jobs/j1"]


@pytest.mark.parametrize(
    ("text", "adapter", "weight"),
    [
        ("a", "a", 1.0),
        ("a@2", "a@2", 1.0),
        ("a@2:-0.25", "a@2", -0.25),
        ("base:a", "base:a", 1.0),
        ("base:a:2", "base:a", 2.0),
        (f"sha256:{'1' * 64}", f"sha256:{'1' * 64}", 1.0),
        (f"sha256:{'1' * 64}:0.5", f"sha256:{'1' * 64}", 0.5),
        ("1e3:1e1", "1e3", 10.0),
    ],
)
def test_sources(polyrank: Polyrank, fake: FakeServer, text: str, adapter: str, weight: float) -> None:
    assert polyrank("merge", "both", "--method", "cat", "--from", text).code == 0
    assert fake.orders[0]["sources"] == [{"adapter": adapter, "weight": weight}]


def test_parameters(polyrank: Polyrank, fake: FakeServer) -> None:
    given = ["density=0.3", "norm=l2", "seed=7", "output_reweighting=false", "mode=peft_exact"]
    polyrank(*ORDER, *[part for text in given for part in ("--set", text)])
    expected = {"density": 0.3, "norm": "l2", "seed": 7, "output_reweighting": False, "mode": "peft_exact"}
    assert fake.orders[0]["parameters"] == expected


@pytest.mark.parametrize(
    "wrong",
    [
        ["merge", "both@2", "--method", "cat", "--from", "a"],
        ["merge", "both", "--method", "cat"],
        ["merge", "both", "--from", "a"],
        ["merge", "both", "--method", "cat", "--from", "a:1000"],
        ["merge", "both", "--method", "cat", "--from", "a:nan"],
        ["merge", "both", "--method", "cat", "--from", "a b"],
        ["merge", "both", "--method", "cat", "--from", "a", "--set", "density"],
        ["merge", "both", "--method", "cat", "--from", "a", "--rank", "0"],
    ],
)
def test_wrong_calls(polyrank: Polyrank, fake: FakeServer, wrong: list[str]) -> None:
    assert polyrank(*wrong).code == 2
    assert fake.requests == []

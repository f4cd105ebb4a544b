"""`polyrank generator` and `polyrank synthesize`."""

import json
import time
from pathlib import Path

import pytest

from server.commands import waiting
from tests.cli.conftest import Polyrank
from tests.cli.fake_server import FakeServer, error


@pytest.fixture(autouse=True)
def held(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.generators = ["icm", "other", "third"]
    fake.versions = {"a": [(b"{}", b"weights")]}
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts"
    path.write_text("first\n\nsecond\n")
    return path


def order(prompts: Path) -> list[str]:
    sources = ["--from", "law=a@1", "--from", "law=a@2", "--from", "verse=base:a"]
    told = ["--examples", f"law={prompts}", "--with-adapter", "law=a", "--examples", f"verse={prompts}"]
    return ["generator", "train", "icm", *sources, *told]


def test_train_says_which_job_it_is(polyrank: Polyrank, fake: FakeServer, prompts: Path, tmp_path: Path) -> None:
    fake.states = ["queued", "queued"]
    vector = tmp_path / "vector"
    vector.write_text("[0.5, 1]")
    more = ["--from", "prose=a", "--condition", f"prose={vector}", "--set", "epochs=3", "--set", "channels=[2,3]"]
    result = polyrank(*order(prompts), *more, "--seed", "7")
    assert (result.code, result.out) == (0, "job j1  queued\n")
    assert fake.orders == [
        {
            "name": "icm",
            "sources": [
                {"adapter": "a@1", "task": "law"},
                {"adapter": "a@2", "task": "law"},
                {"adapter": "base:a", "task": "verse"},
                {"adapter": "a", "task": "prose"},
            ],
            "tasks": {
                "law": {"examples": ["first", "second"], "with_adapter": "a"},
                "verse": {"examples": ["first", "second"]},
                "prose": {"condition": [0.5, 1]},
            },
            "settings": {"epochs": 3, "channels": [2, 3], "seed": 7},
        }
    ]
    assert fake.requests == ["POST /generators"]
    assert json.loads(polyrank(*order(prompts), "--json").out)["id"] == "j1"


def test_train_waits_for_the_version(polyrank: Polyrank, fake: FakeServer, prompts: Path) -> None:
    fake.states = ["queued", "running", "done"]
    result = polyrank(*order(prompts), "--wait", "--replace")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == f"icm@1  {'a' * 64}"
    assert lines[1] == "2 tasks, rank 2 on 4 modules (q_proj), 1000 parameters, 4.0 KiB"
    assert lines[2] == "after 3 epochs: reconstruction 0.25, KL 1.5 nats"
    assert fake.requests == ["POST /generators?replace=true", *["GET /jobs/j1"] * 2]
    fake.states = ["done"]
    assert json.loads(polyrank(*order(prompts), "--wait", "--json").out)["new"] is True


def test_train_tells_errors(polyrank: Polyrank, fake: FakeServer, prompts: Path) -> None:
    fake.states = ["running", "failed"]
    result = polyrank(*order(prompts), "--wait")
    assert (result.code, result.err.strip()) == (1, "error: It is too large. (rank_limit)")
    fake.refuse = error(422, "layouts_differ", "They are not alike.")
    result = polyrank(*order(prompts))
    assert (result.code, result.err.strip()) == (1, "error: They are not alike. (layouts_differ)")


def test_interrupted_it_cancels_the_job(
    polyrank: Polyrank, fake: FakeServer, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.states = ["running", "running", "cancelled"]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert polyrank(*order(prompts), "--wait").code == 130
    assert fake.requests == ["POST /generators", "DELETE /jobs/j1"]


def test_ls_show_and_rm(polyrank: Polyrank, fake: FakeServer) -> None:
    lines = polyrank("generator", "ls").out.splitlines()
    assert lines[0].split() == ["NAME", "VERSION", "TASKS", "RANK", "NUMBERS", "SIZE", "DIGEST"]
    assert [line.split()[0] for line in lines[1:]] == ["icm", "other", "third"]
    assert fake.requests == ["GET /generators", "GET /generators?cursor=2"]
    assert [info["name"] for info in json.loads(polyrank("generator", "ls", "--json").out)] == ["icm", "other", "third"]
    shown = polyrank("generator", "show", "icm@1").out
    assert "tasks       law, verse" in shown
    assert "recipe      2.0 KiB for an adapter of 200.0 KiB" in shown
    assert json.loads(polyrank("generator", "show", "icm", "--json").out)["latent"] == 8
    assert polyrank("generator", "rm", "icm").out == "deleted icm\n"
    assert json.loads(polyrank("generator", "rm", "other", "--json").out) == {"deleted": "other"}
    result = polyrank("generator", "show", "icm")
    assert (result.code, result.err.strip().split("; ")[1]) == (1, "`polyrank generator ls` shows the names there are")


def test_synthesize(polyrank: Polyrank, fake: FakeServer, prompts: Path) -> None:
    result = polyrank("synthesize", "made", "--generator", "icm", "--task", "law", "--seed", "3", "--replace")
    assert result.code == 0
    assert result.out.splitlines()[0].startswith("made@1  ")
    assert result.out.splitlines()[1] == "a recipe of 2.0 KiB (1.00% of the adapter's 200.0 KiB)"
    again = polyrank("synthesize", "made", "--generator", "icm", "--task", "law", "--reconstruct")
    assert "already there" in again.out
    told = ["--examples", str(prompts), "--with-adapter", "a@2", "--statistics-of", "law"]
    made = json.loads(polyrank("synthesize", "more", "--generator", "icm@1", *told, "--json").out)
    assert (made["name"], made["new"]) == ("more", True)
    assert fake.orders == [
        {"name": "made", "task": "law", "seed": 3},
        {"name": "made", "task": "law", "reconstruct": True},
        {"name": "more", "examples": ["first", "second"], "with_adapter": "a@2", "statistics_of": "law"},
    ]
    paths = ["icm/adapters?replace=true", "icm/adapters", "icm@1/adapters"]
    assert fake.requests == [f"POST /generators/{path}" for path in paths]
    fake.refuse = error(422, "unknown_task", "The generator knows no task `prose`.")
    result = polyrank("synthesize", "made", "--generator", "icm", "--task", "prose")
    assert (result.code, result.err.strip()) == (1, "error: The generator knows no task `prose`. (unknown_task)")


def test_files_that_cannot_be_used(polyrank: Polyrank, fake: FakeServer, tmp_path: Path) -> None:
    empty, binary, text = tmp_path / "empty", tmp_path / "binary", tmp_path / "text"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    text.write_text("no numbers")
    for path in (empty, binary):
        result = polyrank("synthesize", "made", "--generator", "icm", "--examples", str(path))
        assert (result.code, "(bad_examples)" in result.err) == (1, True)
    train = ["generator", "train", "icm", "--from", "law=a"]
    assert polyrank(*train, "--examples", f"law={tmp_path / 'nowhere'}").code == 1
    assert polyrank(*train, "--condition", f"law={text}").code == 2
    assert fake.requests == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["generator"],
        ["generator", "train", "icm"],
        ["generator", "train", "icm", "--from", "law=a"],
        ["generator", "train", "icm", "--from", "a", "--condition", "law=x"],
        ["generator", "train", "icm", "--from", "law=a b", "--condition", "law=x"],
        ["generator", "train", "icm@2", "--from", "law=a", "--condition", "law=x"],
        ["generator", "train", "icm", "--from", "law=a", "--condition", "law"],
        ["generator", "train", "icm", "--from", "law=a", "--with-adapter", "law="],
        ["generator", "rm", "icm@1"],
        ["synthesize", "made", "--task", "law"],
        ["synthesize", "made", "--generator", "icm"],
        ["synthesize", "made@1", "--generator", "icm", "--task", "law"],
        ["synthesize", "made", "--generator", "icm", "--task", "law", "--with-adapter", "a"],
        ["synthesize", "made", "--generator", "icm", "--task", "law", "--seed", "-1"],
        ["synthesize", "made", "--generator", "icm", "--examples", "nowhere"],
    ],
)
def test_wrong_calls(polyrank: Polyrank, fake: FakeServer, wrong: list[str]) -> None:
    assert polyrank(*wrong).code == 2
    assert fake.requests == []

"""`polyrank ls`, `show` and `rm`."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Polyrank
from tests.cli.fake_server import FakeServer


def test_ls_reads_every_page(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.versions = {f"adapter-{number}": [(b"{}", b"w" * 2048)] for number in range(5)}
    lines = polyrank("ls").out.splitlines()
    assert lines[0].split() == ["NAME", "VERSION", "KIND", "RANK", "SIZE", "MODULES", "RESIDENCY", "DIGEST"]
    assert [line.split()[0] for line in lines[1:]] == sorted(fake.versions)
    assert lines[1].split()[1:-1] == ["1", "lora", "4-8", "2.0", "KiB", "60/210", "absent"]
    assert len(fake.requests) == 3


def test_ls_of_nothing(polyrank: Polyrank, fake: FakeServer) -> None:
    result = polyrank("ls")
    assert result.code == 0
    assert len(result.out.splitlines()) == 1
    assert json.loads(polyrank("ls", "--json").out) == []


def test_ls_json(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.versions = {name: [(b"{}", b"w")] for name in ("a", "b", "c")}
    assert json.loads(polyrank("ls", "--json").out) == [fake.info(name, 1) for name in "abc"]


def test_show(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.versions = {"a": [(b"{}", b"w"), (b"{}", b"noop")]}
    lines = polyrank("show", "a").out.splitlines()
    assert lines[0].split() == ["name", "a@2"]
    assert lines[2].split(maxsplit=1) == ["weights", "lora, rank 4-8, modules 60/210, 4 B"]
    assert any(line.split() == ["base", "id", "tiny,", "fingerprint", "ffffffff"] for line in lines)
    assert not any("provenance" in line for line in lines)
    assert lines[-1].split()[0] == "warning"
    assert lines[-1].endswith("(adapter_is_noop)")
    assert json.loads(polyrank("show", "a@1", "--json").out) == fake.info("a", 1)


def test_rm(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.versions = {"a": [(b"{}", b"w")]}
    assert polyrank("rm", "a").out == "deleted a\n"
    assert fake.versions == {}
    gone = polyrank("rm", "a")
    assert gone.code == 1
    assert gone.err == (
        "error: The model `a` does not exist. (model_not_found); `polyrank ls` shows the names there are\n"
    )


def test_the_key_of_the_environment_is_sent(
    polyrank: Polyrank, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    polyrank("ls")
    monkeypatch.setenv("POLYRANK_API_KEY", "secret\n")
    polyrank("ls")
    assert fake.authorization == [None, "Bearer secret"]


@pytest.mark.parametrize("key", ["sécret", "sec\nret"])
def test_a_key_that_cannot_be_sent_is_not_shown(
    polyrank: Polyrank, fake: FakeServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("POLYRANK_API_KEY", key)
    result = polyrank("ls")
    assert result.code == 2
    assert "POLYRANK_API_KEY" in result.err
    assert "ret" not in result.err
    assert fake.requests == []


@pytest.mark.parametrize("reference", ["a@1", f"sha256:{'0' * 64}"])
def test_what_acts_on_a_name_takes_no_version(
    polyrank: Polyrank, fake: FakeServer, folder: Path, reference: str
) -> None:
    polyrank("push", "a", folder)
    for arguments in (["rm", reference], ["push", reference, folder]):
        result = polyrank(*arguments)
        assert result.code == 2
        assert "give a name, not a version" in " ".join(result.err.split())
    assert polyrank("show", "a").code == 0
    assert not [request for request in fake.requests if request.startswith("DELETE")]

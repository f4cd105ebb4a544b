"""`polyrank compress`."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Polyrank
from tests.cli.fake_server import FakeServer, error


@pytest.fixture(autouse=True)
def held(fake: FakeServer) -> None:
    fake.versions = {"a": [(b"{}", b"weights")]}


def test_says_what_was_made_and_how_near_it_is(polyrank: Polyrank, fake: FakeServer) -> None:
    result = polyrank("compress", "a")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("a@2  ")
    assert lines[2] == "relative error 0.01, at most 0.01 (model.layers.0.self_attn.q_proj)"
    assert lines[3] == (
        "KL divergence 0.001 nats on average, 0.01 at most; same greedy token at 99.5% of 120 positions"
    )
    assert fake.orders == [{}]


def test_options_are_passed_on(polyrank: Polyrank, fake: FakeServer, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_text("one\n\ntwo\n")
    options = ["--dtype", "native", "--rank", "4", "--energy", "0.9", "--target", "small", "--replace"]
    options += ["--max-error", "0.2", "--max-divergence", "0.5", "--probe", str(probe)]
    result = polyrank("compress", "a@1", *options, "--json")
    assert json.loads(result.out)["name"] == "small"
    assert fake.requests == ["POST /adapters/a@1/compress"]
    expected = {"dtype": "native", "rank": 4, "energy": 0.9, "target": "small", "replace": True}
    assert fake.orders == [expected | {"max_error": 0.2, "max_divergence": 0.5, "probe": ["one", "two"]}]


def test_a_refusal_is_told(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.refuse = error(422, "too_lossy", "The relative error is 0.5; `max_error` allows 0.1.")
    result = polyrank("compress", "a", "--max-error", "0.1")
    assert (result.code, result.err.strip()) == (
        1,
        "error: The relative error is 0.5; `max_error` allows 0.1. (too_lossy)",
    )


@pytest.mark.parametrize("content", [b"\n \n", b"\xff\xfe"])
def test_bad_probes(polyrank: Polyrank, fake: FakeServer, tmp_path: Path, content: bytes) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(content)
    result = polyrank("compress", "a", "--probe", probe)
    assert result.code == 1
    assert "(bad_probe)" in result.err
    assert fake.requests == []


def test_several_names_are_compressed_together(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.versions["b"] = [(b"{}", b"weights")]
    options = ["--method", "jd-full", "--rank", "16", "--clusters", "2", "--max-divergence", "0.5"]
    result = polyrank("compress", "a", "b", *options)
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()[::4]] == ["a@2", "b@2"]
    assert fake.requests == ["POST /compress"]
    expected = {"adapters": ["a", "b"], "method": "jd_full", "rank": 16, "clusters": 2, "max_divergence": 0.5}
    assert fake.orders == [expected]
    told = json.loads(polyrank("compress", "a", "b", "--method", "jd-diag", "--rank", "4", "--json").out)
    assert [info["name"] for info in told["adapters"]] == ["a", "b"]
    assert fake.orders[1] == {"adapters": ["a", "b"], "method": "jd_diag", "rank": 4}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["a", "b"], "by a --method"),
        (["a", "b", "--method", "jd-full"], "needs a --rank"),
        (["a", "b", "--method", "jd-full", "--rank", "4", "--dtype", "int4"], "--dtype does not go with"),
        (["a", "b", "--method", "jd-full", "--rank", "4", "--replace"], "--replace does not go with"),
        (["a", "--clusters", "2"], "--clusters does not go without"),
    ],
)
def test_options_that_do_not_go_together(polyrank: Polyrank, fake: FakeServer, options: list[str], told: str) -> None:
    result = polyrank("compress", *options)
    assert result.code == 2
    assert told in " ".join(result.err.replace("│", " ").split())
    assert fake.requests == []


@pytest.mark.parametrize("wrong", [["--rank", "0"], ["--energy", "2"], ["--dtype", "int2"], ["--probe", "/no/such"]])
def test_wrong_calls(polyrank: Polyrank, fake: FakeServer, wrong: list[str]) -> None:
    assert polyrank("compress", "a", *wrong).code == 2
    assert fake.requests == []

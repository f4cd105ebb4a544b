"""`polyrank generate`."""

import io
import json
from typing import Any

import pytest

from tests.cli.conftest import Polyrank
from tests.cli.fake_server import FakeServer


def token(text: str, special: bool = False) -> dict[str, Any]:
    return {"index": 1, "token": {"id": 5, "text": text, "logprob": -0.1, "special": special}, "generated_text": None}


@pytest.fixture
def events(fake: FakeServer) -> list[dict[str, Any]]:
    end = token(".", special=True) | {"generated_text": " Paris.", "details": {"finish_reason": "eos_token"}}
    fake.events = [token(" Paris"), token(""), end]
    return fake.events


def test_prints_the_answer_only(polyrank: Polyrank, fake: FakeServer, events: list[dict[str, Any]]) -> None:
    result = polyrank("generate", "The capital of France is")
    assert (result.code, result.out, result.err) == (0, " Paris.\n", "")
    assert fake.requests == ["POST /generate_stream"]
    parameters = {"max_new_tokens": 64, "do_sample": False}
    assert fake.prompts == [{"inputs": "The capital of France is", "parameters": parameters}]


def test_options_reach_the_server(polyrank: Polyrank, fake: FakeServer, events: list[dict[str, Any]]) -> None:
    fake.versions = {"a": [(b"", b"")]}
    options = ("--adapter", "a", "--max-new-tokens", "3", "--temperature", "0.5", "--seed", "0")
    assert polyrank("generate", *options, "--stop", "x", "--stop", "\n", "Hi").code == 0
    assert fake.requests == ["POST /generate_stream?adapter=a"]
    assert fake.prompts[0]["parameters"] == {
        "max_new_tokens": 3,
        "do_sample": True,
        "temperature": 0.5,
        "seed": 0,
        "stop": ["x", "\n"],
    }


def test_prompt_from_stdin(
    polyrank: Polyrank, fake: FakeServer, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Two\nlines"))
    polyrank("generate", "-")
    assert fake.prompts[0]["inputs"] == "Two\nlines"


def test_json_names_the_adapter(polyrank: Polyrank, fake: FakeServer, events: list[dict[str, Any]]) -> None:
    fake.versions = {"a": [(b"", b"")]}
    result = json.loads(polyrank("generate", "--adapter", "a", "--json", "Hi").out)
    assert result["generated_text"] == " Paris."
    assert (result["adapter"], result["digest"]) == ("a@1", "0")


def test_unknown_adapter(polyrank: Polyrank, fake: FakeServer) -> None:
    result = polyrank("generate", "--adapter", "nope", "Hi")
    assert result.code == 1
    assert "no such adapter (model_not_found); `polyrank ls`" in result.err


def test_an_error_within_the_stream_fails(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.events = [token(" Paris"), {"error": "NaN logits", "error_type": "generation"}]
    result = polyrank("generate", "Hi")
    assert result.code == 1
    assert "NaN logits (generation)" in result.err


def test_an_answer_that_is_cut_off_fails(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.events = [token(" Paris")]
    result = polyrank("generate", "Hi")
    assert result.code == 1
    assert "incomplete_answer" in result.err


def test_a_pipe_gets_the_bytes_as_they_are(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.events = [token("\x1b[31m"), token("") | {"generated_text": "\x1b[31m"}]
    assert polyrank("generate", "Hi").out == "\x1b[31m\n"


def test_an_answer_that_ends_its_line_gets_no_second_end(polyrank: Polyrank, fake: FakeServer) -> None:
    fake.events = [token(" Paris"), token("\n"), token("") | {"generated_text": " Paris\n"}]
    assert polyrank("generate", "Hi").out == " Paris\n"

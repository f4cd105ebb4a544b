"""Every file of `deploy/examples/clients` does what it says, against the server that its environment names."""

import json
import os
import runpy
import shlex
import subprocess
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import yaml

from tests.clients.live import LiveServer
from tests.contract.sources import ROOT

EXAMPLES = ROOT / "deploy" / "examples" / "clients"
PROMPT = "Review: What a lovely hotel!\nSentiment (positive or negative):"
KEY = "a-key"
WITHOUT_A_TEST_OF_THEIR_OWN = {"README.md", "reviews.yaml", "reviews.jsonl"}
pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")  # lorax-client, newer pydantic


@pytest.fixture
def environment(real_live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    [adapter, other] = real_live.adapters
    told = {"POLYRANK_URL": real_live.base_url, "POLYRANK_API_KEY": KEY, "ADAPTER": adapter, "OTHER_ADAPTER": other}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # else its client asks no server at all


def completion(server: LiveServer, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    text: str = httpx.post(f"{server.base_url}/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def chat(server: LiveServer, model: str) -> str:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body).json()
    text: str = answer["choices"][0]["message"]["content"]
    return text


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("name", ["with_openai.py", "with_langchain.py", "with_huggingface.py", "with_lorax.py"])
def test_python(name: str, real_live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    [adapter, other] = real_live.adapters
    printed = run(name, capsys)
    assert f"{adapter}: {completion(real_live, adapter)}\n" in printed
    assert f"streamed: {completion(real_live, adapter)}\n" in printed
    if name != "with_lorax.py":
        assert f"chat: {chat(real_live, adapter)}\n" in printed
    if name == "with_openai.py":
        assert f"models: {real_live.model}, {adapter}, {other}\n" in printed
        assert f"{other}: {completion(real_live, other)}\n" in printed
    if name == "with_langchain.py":
        assert f"{other}: {chat(real_live, other)}\n" in printed
    if name == "with_huggingface.py":
        assert f"base: {completion(real_live, real_live.model)}\n" in printed
    if name == "with_lorax.py":
        assert f"{adapter} and {other}: " in printed


@pytest.mark.usefixtures("environment")
def test_curl(real_live: LiveServer) -> None:
    [adapter, _] = real_live.adapters
    ran = subprocess.run([EXAMPLES / "curl.sh"], capture_output=True, text=True, check=True, timeout=60)
    models, whole, *stream, query, body = [line for line in ran.stdout.splitlines() if line]
    assert [model["id"] for model in json.loads(models)["data"]] == [real_live.model, *real_live.adapters]
    expected = completion(real_live, adapter)
    assert json.loads(whole)["choices"][0]["text"] == expected
    assert json.loads(query)["generated_text"] == json.loads(body)["generated_text"] == expected
    assert stream[-1] == "data: [DONE]"
    assert json.loads(stream[0].removeprefix("data: "))["model"] == f"base:{adapter}"


@pytest.mark.usefixtures("environment")
def test_curl_fails_where_the_server_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER", "nobody")
    ran = subprocess.run([EXAMPLES / "curl.sh"], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode != 0
    assert "The model `nobody` does not exist." in ran.stdout


@pytest.mark.usefixtures("environment")
def test_lm_eval(real_live: LiveServer, tmp_path: Path) -> None:
    """A stand-in for the command takes down how it was called; `test_lm_eval.py` runs the model that it names."""
    command, taken = tmp_path / "lm_eval", tmp_path / "taken"
    command.write_text(f'#!/bin/sh\nprintf "%s\\0" "$OPENAI_API_KEY" "$PWD" "$@" > {shlex.quote(str(taken))}\n')
    command.chmod(0o700)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([EXAMPLES / "lm_eval.sh", "--limit", "2"], check=True, timeout=60, env={**os.environ, "PATH": path})
    key, folder, *words = taken.read_text().split("\0")[:-1]
    [adapter, _] = real_live.adapters
    assert key == KEY
    assert Path(folder) == EXAMPLES
    assert words[:3] == ["run", "--model", "local-completions"]
    told = dict(pair.split("=", 1) for pair in words[words.index("--model_args") + 1].split(","))
    url = f"{real_live.base_url}/v1/completions"
    assert told == {"model": adapter, "base_url": url, "auth_token": KEY, "num_concurrent": "8"}
    assert words[words.index("--tasks") + 1] == yaml.safe_load((EXAMPLES / "reviews.yaml").read_text())["task"]
    assert words[-2:] == ["--limit", "2"]


def test_every_example_is_in_the_table_and_run() -> None:
    table, here = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    for name in names - WITHOUT_A_TEST_OF_THEIR_OWN:
        assert f"[{name}]({name})" in table
        assert f'"{name}"' in here
    assert names >= WITHOUT_A_TEST_OF_THEIR_OWN

"""The README's commands against a server that `polyrank serve` starts: what it promises is what one sees."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.contract.sources import ROOT

POLYRANK = f"{shlex.quote(sys.executable)} -m server"
README = (ROOT / "README.md").read_text()


@dataclass(frozen=True)
class RealServer:
    url: str
    announced: str  # what it printed when it was ready


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("real")
    port = free_port()
    options = ["--port", str(port), "--store", str(folder / "store"), "--preload", "deploy/examples/adapters"]
    options += ["--kv-cache-memory", "64MiB", "--adapter-memory", "64MiB"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYRANK_")}
    environment |= {key: value for key, value in os.environ.items() if key == "POLYRANK_CACHE"}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "server", "serve", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment)
    try:
        assert process.stdout is not None
        announced = ""
        while not announced.endswith("\n\n") or "Try:" not in announced:
            line = process.stdout.readline()
            assert line, f"the server ended: {(folder / 'log').read_text()[-2000:]}"
            announced += line
        yield RealServer(f"http://127.0.0.1:{port}", announced)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0  # nothing is running: less than the 30 s that running requests get
    finally:
        process.kill()
        process.communicate()


def block(title: str, language: str, number: int = 0) -> str:
    """A code block of a section of the README."""
    text = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return blocks[number]


def bash(script: str, server: RealServer, **variables: str) -> str:
    script = script.replace("http://127.0.0.1:8000", server.url).replace(".venv/bin/polyrank", POLYRANK)
    environment = os.environ | {"POLYRANK_URL": server.url} | variables
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def test_says_where_it_is_and_what_to_try(real: RealServer) -> None:
    assert f"Polyrank is ready at {real.url}\n" in real.announced
    curl = real.announced.partition("Try:\n")[2].strip()
    assert "The TENANT shall pay the LANDLORD EUR 500" in bash(curl, real)


def test_first_request_of_the_readme(real: RealServer) -> None:
    assert bash(block("Two commands", "bash", 1), real).strip() == block("Two commands", "json").strip()


def test_own_adapter_with_the_command(real: RealServer, tmp_path: Path) -> None:
    script = block("Your own adapter", "bash").replace("my-copy", str(tmp_path / "my-copy"))
    lines = bash(script, real).splitlines()
    assert lines[0].startswith("date-iso-2@1  ")
    assert [line.split()[0] for line in lines if "lora  8" in line].count("date-iso-2") == 1
    assert " 1914-02-03" in lines
    assert lines[-1] == "deleted date-iso-2"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        given = ROOT / "deploy" / "examples" / "adapters" / "date-iso" / name
        assert (tmp_path / "my-copy" / name).read_bytes() == given.read_bytes()


def test_own_adapter_with_curl(real: RealServer) -> None:
    assert '"name":"date-iso-2"' in bash(block("Your own adapter", "bash", 1), real)
    bash(f"{POLYRANK} rm date-iso-2", real)


def test_a_smaller_version(real: RealServer) -> None:
    lines = bash(block("Your own adapter", "bash", 2), real).splitlines()
    assert lines[0].startswith("date-iso-small@1  ")
    assert "same greedy token at" in lines[-1]
    prompt = shlex.quote("Normalize the date: 3 Feb 1914\nAnswer:")
    said = bash(f"{POLYRANK} generate --adapter date-iso-small --max-new-tokens 12 {prompt}", real)
    assert said.startswith(" 1914-02-03")
    sizes = [httpx.get(f"{real.url}/adapters/{name}").json()["bytes"] for name in ("date-iso", "date-iso-small")]
    assert sizes[1] < sizes[0] / 2


def test_the_built_in_model_goes_by_its_alias(real: RealServer) -> None:
    base = httpx.get(f"{real.url}/v1/models/smollm2").json()
    assert base["parent"] is None
    answer = httpx.post(
        f"{real.url}/generate?adapter=smollm2", json={"inputs": "a", "parameters": {"max_new_tokens": 1}}
    )
    assert answer.headers["X-Adapter"] == base["id"]
    push = shlex.split(f"{POLYRANK} push smollm2 deploy/examples/adapters/date-iso --url {real.url}")
    refused = subprocess.run(push, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, "means the base model" in refused.stderr) == (1, True)


def test_openai_client(real: RealServer) -> None:
    code = block("With OpenAI's client", "python").replace("http://127.0.0.1:8000", real.url)
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    models, answer = run.stdout.splitlines()
    assert "'date-iso'" in models
    assert answer == " 1914-02-03"

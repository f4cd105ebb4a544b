"""`polyrank bench` on a server of ours, by both of its ways to generate."""

import json
from pathlib import Path

import pytest

from server import cli
from tests.support.models import save_tiny, tiny_model
from tests.support.nursery import BornServer, Nursery
from tests.support.peft_oracle import random_lora


def test_both_endpoints(nursery: Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    for seed in range(2):
        random_lora(tmp_path / "adapters" / f"a{seed}", tiny_model("llama"), seed, r=4, lora_alpha=8)
    options = ("--model", str(base), "--store", "memory://", "--preload", str(tmp_path / "adapters"), "--no-compile")
    shape = ("--requests", "6", "--concurrency", "3", "--input-tokens", "20", "--output-tokens", "7", "--json", "-")
    with BornServer(nursery, *options, "--kv-cache-memory", "4MiB", log=tmp_path / "log") as server:
        for endpoint in ("completions", "generate"):
            arguments = [
                "bench",
                "--url",
                server.url,
                "--endpoint",
                endpoint,
                "--adapter",
                "a0",
                "--adapter",
                "a1",
                *shape,
            ]
            assert cli.run(arguments) == 0
            found = json.loads(capsys.readouterr().out)
            assert (found["answered"], found["errors"], found["output_tokens"]) == (6, {}, 42)
            assert {name: own["requests"] for name, own in found["models"].items()} == {"a0": 3, "a1": 3}
            if endpoint == "completions":
                assert found["input_tokens"] == 120
        assert cli.run(["bench", "--url", server.url, "--adapter", "nobody", "--requests", "1", "--json", "-"]) == 1
        assert json.loads(capsys.readouterr().out)["errors"] == {"404 model_not_found": 1}

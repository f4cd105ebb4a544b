"""One server, one batch, every kind of adapter that PEFT makes: uploaded over HTTP, each answered as PEFT does."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.adapters_store.formats.kinds.support import trained
from tests.support.models import save_tiny
from tests.support.peft_kinds import IDS, KINDS, TEXT, change
from tests.support.server_process import ServerProcess

NEW_TOKENS = 48
OPTIONS = ("--dtype", "float32", "--no-compile", "--max-running", "64", "--max-batch-tokens", "4096")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """A folder of adapters by kind, and PEFT's greedy tokens of each, one by one."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for number, (kind, make) in enumerate(KINDS.items()):
        _, adapted = trained("llama", make(), folder / kind, seed=number, change=change)
        found[kind] = _greedy(adapted, NEW_TOKENS)
    return folder, found


def _greedy(model: Any, count: int) -> list[int]:
    tokens = list(IDS)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(IDS) :]


def test_one_batch_of_every_kind(answers: tuple[Path, dict[str, list[int]]], tmp_path: Path) -> None:
    folder, expected = answers
    assert len({tuple(tokens) for tokens in expected.values()}) > 0.9 * len(KINDS), "the kinds hardly differ"
    model = save_tiny(tmp_path / "base", "llama")
    with ServerProcess(str(model), tmp_path / "store", *OPTIONS, log=tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for kind in KINDS:
                _upload(client, kind, folder / kind)
        found, together = asyncio.run(_all_at_once(server.url, ["base", *KINDS]))
    wrong = {kind: (found[kind], expected[kind]) for kind in KINDS if found[kind] != expected[kind]}
    assert not wrong, f"{sorted(wrong)}: {next(iter(wrong.values()))}"
    assert together >= 30, f"only {together} requests ran at once"


def _upload(client: httpx.Client, kind: str, folder: Path) -> None:
    files = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
    answer = client.put(f"/adapters/{kind}", files={part: path.read_bytes() for part, path in files.items()})
    assert answer.status_code == 201, (kind, answer.text)


async def _all_at_once(url: str, kinds: list[str]) -> tuple[dict[str, list[int]], int]:
    """Tokens of each, and how many requests had begun to answer before the first of them ended.

    Twice, the adapters being in memory the second time.
    """
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=100)) as client:
        await asyncio.gather(*(_stream(client, kind) for kind in kinds))
        streams = await asyncio.gather(*(_stream(client, kind) for kind in kinds))
    ended = min(last for _, _, last in streams)
    return {kind: tokens for kind, (tokens, _, _) in zip(kinds, streams, strict=True)}, sum(
        first < ended for _, first, _ in streams
    )


async def _stream(client: httpx.AsyncClient, kind: str) -> tuple[list[int], float, float]:
    parameters: dict[str, object] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    parameters |= {} if kind == "base" else {"adapter_id": kind}
    body = {"inputs": TEXT, "parameters": parameters}
    tokens, first = [], 0.0
    async with client.stream("POST", "/generate_stream", json=body) as answer:
        assert answer.status_code == 200, (kind, await answer.aread())
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                first = first or time.monotonic()
                tokens.append(json.loads(line[5:])["token"]["id"])
    return tokens, first, time.monotonic()

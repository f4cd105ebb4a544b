"""One server, one batch, every kind of adapter that PEFT makes: uploaded over HTTP, each answered as PEFT does."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch

from tests.adapters_store.formats.kinds.support import trained
from tests.support.greedy import greedy
from tests.support.models import save_tiny
from tests.support.peft_kinds import IDS, TARGETS, TEXT, change, config, kinds
from tests.support.server_process import ServerProcess

NEW_TOKENS = 24  # compared
LONG = 120  # so that all are at work before the first has ended
OPTIONS = ("--dtype", "float32", "--no-compile", "--max-running", "64", "--max-batch-tokens", "4096")
TOGETHER = {"llama": 30, "qwen2": 30, "gpt2": 20}  # PEFT makes fewer kinds of GPT-2


@dataclass(slots=True)
class Answer:
    """Greedy tokens, the log probability of each, and when the first and the last came."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0


@pytest.mark.parametrize("architecture", TARGETS)
def test_one_batch_of_every_kind(architecture: str, tmp_path: Path) -> None:
    every, expected = kinds(architecture), {}
    for number, kind in enumerate(every):
        _, adapted = trained(architecture, config(kind, architecture), tmp_path / kind, seed=number, change=change)
        further = {"task_ids": torch.tensor([0])} if kind == "poly" else {}
        expected[kind] = Answer(*greedy(adapted, IDS, NEW_TOKENS, **further))
    assert len({tuple(answer.tokens) for answer in expected.values()}) > 0.9 * len(every), "the kinds hardly differ"
    model = save_tiny(tmp_path / "base", architecture)
    with ServerProcess(str(model), tmp_path / "store", *OPTIONS, log=tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for kind in every:
                _upload(client, kind, tmp_path / kind)
        alone, together = asyncio.run(_ask(server.url, every))
    for found in (alone, together):
        _compare(found, expected)
    ended = min(answer.last for answer in together.values())
    at_once = sum(answer.first < ended for answer in together.values())
    assert at_once >= TOGETHER[architecture], f"only {at_once} requests ran at once"


def _compare(found: dict[str, Answer], expected: dict[str, Answer]) -> None:
    wrong = [kind for kind in expected if found[kind].tokens[:NEW_TOKENS] != expected[kind].tokens]
    assert not wrong, wrong
    for kind, answer in expected.items():
        logs = torch.tensor(found[kind].logprobs[:NEW_TOKENS]), torch.tensor(answer.logprobs)
        assert torch.allclose(*logs, rtol=1e-4, atol=1e-3), (kind, logs)


def _upload(client: httpx.Client, kind: str, folder: Path) -> None:
    files = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
    answer = client.put(f"/adapters/{kind}", files={part: path.read_bytes() for part, path in files.items()})
    assert answer.status_code == 201, (kind, answer.text)


async def _ask(url: str, every: list[str]) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """Every kind one after another, which brings all into memory; then all at once, beside a request to the base."""
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=100)) as client:
        alone = {kind: await _stream(client, kind, NEW_TOKENS) for kind in every}
        answers = await asyncio.gather(*(_stream(client, kind, LONG) for kind in (*every, None)))
    return alone, dict(zip(every, answers, strict=False))


async def _stream(client: httpx.AsyncClient, kind: str | None, count: int) -> Answer:
    parameters: dict[str, object] = {"max_new_tokens": count, "ignore_eos": True}
    parameters |= {"adapter_id": kind} if kind else {}
    answer = Answer()
    async with client.stream("POST", "/generate_stream", json={"inputs": TEXT, "parameters": parameters}) as lines:
        assert lines.status_code == 200, (kind, await lines.aread())
        async for line in lines.aiter_lines():
            if line.startswith("data:"):
                answer.first = answer.first or time.monotonic()
                token = json.loads(line[5:])["token"]
                answer.tokens.append(token["id"])
                answer.logprobs.append(token["logprob"])
    answer.last = time.monotonic()
    return answer

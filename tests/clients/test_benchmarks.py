"""What `vllm bench serve` and guidellm send, and their ways of reading the answer.

Neither runs here: vLLM needs a build of its own, and guidellm brings datasets and pyarrow, and asks for an older click.
The shapes are those of vLLM's `endpoint_request_func` and guidellm 0.8.1's `request_handlers`.
"""

import asyncio
import codecs
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx
import pytest

from tests.clients.live import LiveServer

PROMPT = "one base model, many adapters"
TOKENS = 12


@dataclass
class Measured:
    """Of one request: its text, how many events had a choice, and the usage at its end."""

    text: str = ""
    pieces: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    done: bool = False
    model: str = ""


class VllmReader:
    """vLLM's: every piece off the wire is stripped; an event ends at a blank line, or where its JSON is whole."""

    def __init__(self) -> None:
        self._buffer = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, piece: bytes) -> list[str]:
        self._buffer += self._decoder.decode(piece.strip())
        *whole, self._buffer = self._buffer.split("\n\n")
        if self._buffer.startswith("data: ") and self._is_whole(self._buffer.removeprefix("data: ").strip()):
            whole.append(self._buffer)
            self._buffer = ""
        return [message.strip().removeprefix("data: ") for message in whole if message.strip()]

    @staticmethod
    def _is_whole(data: str) -> bool:
        try:
            json.loads(data)
        except json.JSONDecodeError:
            return data == "[DONE]"
        return True


def take(found: Measured, data: str) -> None:
    """Both clients: choices are tokens, an event without choices is the usage, and nothing comes behind `[DONE]`."""
    assert not found.done
    if data == "[DONE]":
        found.done = True
        return
    event = json.loads(data)
    found.model = event["model"]
    if choices := event.get("choices"):
        found.text += (choices[0]["delta"].get("content") if "delta" in choices[0] else choices[0].get("text")) or ""
        found.pieces += 1
    if usage := event.get("usage"):
        found.usage = usage


def vllm_body(path: str, model: str, prompt: str | list[int], **extra: object) -> dict[str, object]:
    """`--backend openai` and `openai-chat`. extra: `--extra-body` and sampling options."""
    common = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0}
    if path.endswith("chat/completions"):
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        return {"model": model, "messages": messages, "max_completion_tokens": TOKENS, **common, **extra}
    body = {"prompt": prompt, "repetition_penalty": 1.0, "max_tokens": TOKENS, "logprobs": None}
    return {"model": model, **body, **common, **extra}


async def vllm_request(session: aiohttp.ClientSession, url: str, body: dict[str, object], number: int = 0) -> Measured:
    found, reader = Measured(), VllmReader()
    headers = {"Authorization": "Bearer none", "x-request-id": f"bench-{number}"}
    async with session.post(url, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.headers["x-request-id"] == f"bench-{number}"
        async for piece in response.content.iter_any():
            for data in reader.feed(piece):
                take(found, data)
    return found


PATHS = pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])


@PATHS
async def test_vllm_bench_with_lora_modules(live_server: LiveServer, path: str) -> None:
    """`--lora-modules legal poet --lora-assignment round-robin`: all at once, each request with a model of its own."""
    names = [live_server.adapters[number % 2] for number in range(8)]
    async with aiohttp.ClientSession() as session:
        asked = [
            vllm_request(session, live_server.base_url + path, vllm_body(path, name, PROMPT), number)
            for number, name in enumerate(names)
        ]
        answers = await asyncio.gather(*asked)
    assert [answer.model for answer in answers] == names
    for answer in answers:
        assert answer.done
        assert answer.usage["completion_tokens"] == TOKENS  # ignore_eos: the rates it computes rely on this
        assert answer.usage["prompt_tokens"] == answers[0].usage["prompt_tokens"]
        assert answer.pieces > 1
    texts = Counter(zip(names, [answer.text for answer in answers], strict=True))
    assert len(texts) == 2  # the same question of the same adapter has one answer


async def test_vllm_bench_tells_adapters_apart(real_live: LiveServer) -> None:
    url = real_live.base_url + "/v1/completions"
    async with aiohttp.ClientSession() as session:
        names = (real_live.model, *real_live.adapters)
        texts = [(await vllm_request(session, url, vllm_body(url, name, PROMPT))).text for name in names]
    assert len(set(texts)) == 3


async def test_vllm_bench_variants(live_server: LiveServer) -> None:
    """Prompts as tokens (`--skip-tokenizer-init`), `--logprobs`, sampling options, and answers of one token."""
    url, [legal, _] = live_server.base_url + "/v1/completions", live_server.adapters
    bodies = [
        vllm_body(url, legal, [5, 6, 7]),
        vllm_body(url, legal, PROMPT, logprobs=1),
        vllm_body(url, legal, PROMPT, temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, frequency_penalty=0.5),
        vllm_body(url, legal, PROMPT, max_tokens=1),
    ]
    async with aiohttp.ClientSession() as session:
        answers = [await vllm_request(session, url, body) for body in bodies]
    assert [answer.usage["completion_tokens"] for answer in answers] == [TOKENS, TOKENS, TOKENS, 1]
    assert all(answer.pieces >= 1 for answer in answers)  # else it counts the request as failed
    assert answers[0].usage["prompt_tokens"] == 3


async def test_vllm_bench_before_it_starts(live_server: LiveServer) -> None:
    """The first model with its root, the lengths of prompts by the server's tokenizer, and the metrics."""
    async with httpx.AsyncClient(base_url=live_server.base_url) as client:
        first = (await client.get("/v1/models")).json()["data"][0]
        assert first["id"] == live_server.model
        assert first["root"]
        asked = {"model": live_server.adapters[0], "prompt": PROMPT, "add_special_tokens": False}
        tokens = (await client.post("/tokenize", json=asked)).json()["tokens"]
        back = await client.post("/detokenize", json={"model": first["id"], "tokens": tokens[:4]})
        assert PROMPT.startswith(back.json()["prompt"])
        assert "vllm:spec_decode" not in (await client.get("/metrics")).text  # else it would expect drafts


def test_vllm_bench_sees_refusals(live_server: LiveServer) -> None:
    """It takes any status but 200 for a failure, so none may come as an event of a good answer."""
    body = vllm_body("/v1/completions", "nobody", PROMPT)
    assert httpx.post(f"{live_server.base_url}/v1/completions", json=body).status_code == 404


def guidellm_body(path: str, model: str, stream: bool) -> dict[str, Any]:
    """Its backend leaves fields that are null out, so `stop` is not sent."""
    body: dict[str, Any] = {"model": model, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    if path.endswith("chat/completions"):
        messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
        return {**body, "messages": messages, "max_completion_tokens": TOKENS}
    return {**body, "prompt": PROMPT, "max_tokens": TOKENS}


@PATHS
async def test_guidellm(live_server: LiveServer, path: str) -> None:
    """`/health` and `/v1/models` first; then whole and streamed, with the usage so far in every event."""
    [legal, poet] = live_server.adapters
    headers = {"Authorization": "Bearer none"}
    async with httpx.AsyncClient(base_url=live_server.base_url, headers=headers) as client:
        (await client.get("/health")).raise_for_status()
        assert legal in [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        whole = (await client.post(path, json=guidellm_body(path, legal, stream=False))).json()
        assert whole["usage"]["completion_tokens"] == TOKENS
        counts = []
        found = Measured()
        async with client.stream("POST", path, json=guidellm_body(path, poet, stream=True)) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    take(found, line.removeprefix("data:").strip())
                    counts.append(found.usage["completion_tokens"])
    assert found.done
    assert counts == sorted(counts)
    assert counts[-1] == TOKENS
    assert found.usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert found.text

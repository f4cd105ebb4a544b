"""vLLM's loading and unloading as its tools use it, and SGLang's names of models, over the real engine."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.clients.live import LiveServer

PROMPT = "one base model, many adapters"


@pytest.fixture
def client(real_live: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{real_live.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def broken(real_live: LiveServer) -> Path:
    """A folder below the adapter root whose weights are none."""
    assert real_live.folder is not None
    folder = real_live.folder / "adapters" / "broken"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(b'{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}')
    (folder / "adapter_model.safetensors").write_bytes(b"nothing that can be read")
    return folder


def text(client: OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text


def load(server: LiveServer, name: str, path: str, **more: bool) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **more}
    return httpx.post(f"{server.base_url}/v1/load_lora_adapter", json=body, timeout=60)


def unload(server: LiveServer, name: str) -> httpx.Response:
    return httpx.post(f"{server.base_url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=60)


def test_an_adapter_comes_is_replaced_and_goes(real_live: LiveServer, client: OpenAI) -> None:
    [legal, poet] = real_live.adapters
    known = {name: text(client, name) for name in (real_live.model, legal, poet)}
    assert len(set(known.values())) == 3
    answer = load(real_live, "fresh", legal)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'fresh' added successfully.")
    card = client.models.retrieve("fresh").to_dict()
    assert card["parent"] == real_live.model
    assert text(client, "fresh") == known[legal]

    again = load(real_live, "fresh", poet)
    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    assert again.json()["error"]["message"] == (
        "The lora adapter 'fresh' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True."
    )
    assert text(client, "fresh") == known[legal]
    assert load(real_live, "fresh", poet, load_inplace=True, is_3d_lora_weight=False).status_code == 200
    assert text(client, "fresh") == known[poet]

    gone = unload(real_live, "fresh")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'fresh' removed successfully.")
    assert "fresh" not in {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError, match="The model `fresh` was deleted"):
        text(client, "fresh")
    missing = unload(real_live, "fresh")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "NotFoundError"
    assert missing.json()["error"]["message"] == "The lora adapter 'fresh' cannot be found."


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [("fresh", "nowhere", 404), ("fresh", "..", 403), ("fresh", "/", 403), ("fresh", "", 400), ("", "legal", 400)],
)
def test_what_cannot_be_loaded(real_live: LiveServer, client: OpenAI, name: str, path: str, status: int) -> None:
    assert load(real_live, name, path).status_code == status
    assert {model.id for model in client.models.list()} == {real_live.model, *real_live.adapters}
    assert unload(real_live, name).status_code == (404 if name else 400)


async def test_bad_loads_do_not_hurt_good_requests(real_live: LiveServer, client: OpenAI, broken: Path) -> None:
    """vLLM's own check, with 422 where vLLM has 500: what is wrong with a file is the caller's to mend."""
    [legal, _] = real_live.adapters
    expected = text(client, legal)
    body = {"lora_name": "bad", "lora_path": broken.name}
    async with (
        AsyncOpenAI(base_url=f"{real_live.base_url}/v1", api_key="none", max_retries=0) as traffic,
        httpx.AsyncClient(base_url=real_live.base_url, timeout=60) as admin,
    ):
        good = [traffic.completions.create(model=legal, prompt=PROMPT, max_tokens=8, temperature=0) for _ in range(10)]
        bad = [admin.post("/v1/load_lora_adapter", json=body) for _ in range(20)]
        answers, refusals = await asyncio.gather(asyncio.gather(*good), asyncio.gather(*bad))
    assert [answer.choices[0].text for answer in answers] == [expected] * 10
    codes = {(refusal.status_code, refusal.json()["error"]["code"]) for refusal in refusals}
    busy = (503, "overloaded")  # more uploads at once than are taken
    assert {status for status, _ in codes - {busy}} == {422}
    assert all("retry-after" in refusal.headers for refusal in refusals if refusal.status_code == 503)
    assert "bad" not in {model.id for model in client.models.list()}


def test_sglang_names(real_live: LiveServer, client: OpenAI) -> None:
    """`base:adapter` is the adapter and `base:` the base, by the word and by the model's own id."""
    models = (real_live.model, *real_live.adapters)
    known = {name: text(client, name) for name in models}
    assert len(set(known.values())) == 3
    for base in {"base", real_live.model}:
        assert text(client, f"{base}:") == known[real_live.model]
        for adapter in real_live.adapters:
            assert text(client, f"{base}:{adapter}") == known[adapter]
    with pytest.raises(openai.NotFoundError):
        text(client, f"{real_live.model}:nobody")

"""What callers send and get is in no line of the log: no prompt, no answer, no adapter's content, no key."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file, save_file

from tests.support.models import save_tiny, tiny_model
from tests.support.nursery import BornServer, Nursery
from tests.support.peft_oracle import random_lora

CANARY = "kanarienvogel"
ANSWER = "zeisig"  # what a grammar makes the model say
OPTIONS = ("--no-compile", "--kv-cache-memory", "4MiB", "--adapter-memory", "4MiB", "--device-memory", "8MiB")
SECRETS = {
    "Authorization": f"Bearer {CANARY}-key",
    "Cookie": f"session={CANARY}-cookie",
    "X-Api-Key": f"{CANARY}-key",
    "User-Agent": f"{CANARY}-agent",
}


def adapter(folder: Path) -> tuple[bytes, bytes]:
    """A config and weights, each with a canary."""
    made = random_lora(folder, tiny_model("llama"), 1, r=4, lora_alpha=8)
    config = json.loads((made / "adapter_config.json").read_text()) | {"revision": f"{CANARY}-config"}
    weights = load_file(made / "adapter_model.safetensors")
    save_file(weights, made / "canary.safetensors", metadata={"format": "pt", "note": f"{CANARY}-metadata"})
    return json.dumps(config).encode(), (made / "canary.safetensors").read_bytes()


def generations() -> list[tuple[str, dict[str, Any]]]:
    """Every way to generate, plain and as a stream, and what they refuse."""
    text = f"{CANARY}-prompt"
    schema = {"type": "json_schema", "json_schema": {"name": CANARY, "schema": {"const": ANSWER}}}
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "model": "mine"}
    plain: dict[str, Any] = {
        "prompt": text,
        "max_tokens": 12,
        "model": "mine",
        "echo": True,
        "logprobs": 1,
        "stop": [CANARY * 2],
    }
    tgi: dict[str, Any] = {
        "inputs": text,
        "parameters": {"max_new_tokens": 12, "details": True, "return_full_text": True},
    }
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", chat | {"response_format": schema}),
        ("/v1/completions", plain),
    ]
    calls += [(path, tgi) for path in ("/generate", "/", "/generate_stream")]
    calls += [(path, body | {"stream": True}) for path, body in calls if path != "/generate_stream"]
    calls += [(path, body | {CANARY: text}) for path, body in calls]
    calls += [(path, body | {"model": f"{CANARY}\n"}) for path, body in calls[:3]]
    bad = {"type": "regex", "value": f"({CANARY}"}
    calls.append(("/generate", {"inputs": text, "parameters": {"grammar": bad}}))
    calls += [(path, {"prompt": text, "messages": text, "tokens": text}) for path in ("/tokenize", "/detokenize")]
    return [*calls, ("/tokenize", {"prompt": text}), ("/merge", {"name": "x", "method": CANARY, "sources": [text]})]


def call_everything(client: httpx.Client, config: bytes, weights: bytes) -> int:
    """How many calls were answered with 200 or 201."""
    sent = [client.put("/adapters/mine", files={"config": config, "weights": weights})]
    torn = {"config": config + CANARY.encode(), "weights": weights[:-9]}
    sent += [client.put("/adapters/torn", files=files) for files in (torn, {"weights": CANARY.encode() * 9})]
    sent += [client.post(path, json=body) for path, body in generations()]
    sent.append(client.post("/generate", content=f'{{"inputs": "{CANARY}'.encode()))
    operations = client.get("/openapi.json").json()["paths"]
    for last in (False, True):  # what deletes comes last
        for path, methods in operations.items():
            filled = re.sub(r"\{\w+\}", "mine", path)
            for method in methods:
                if (method == "delete") is last:
                    body = None if method in ("get", "delete") else {"name": f"{CANARY} name", "adapters": [CANARY]}
                    sent.append(client.request(method, filled, json=body, params={"probe": f"{CANARY}-query"}))
    assert not [answer for answer in sent if answer.status_code == 500], [a.text for a in sent if a.status_code == 500]
    return sum(answer.status_code in (200, 201) for answer in sent)


def test_nothing_of_the_content_is_logged(nursery: Nursery, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    config, weights = adapter(tmp_path / "adapter")
    options = ("--model", str(base), "--store", str(tmp_path / "store"), "--log-level", "debug", "--log-format", "json")
    server = BornServer(nursery, *options, *OPTIONS, log=tmp_path / "log")
    with server, httpx.Client(base_url=server.url, headers=SECRETS, timeout=60) as client:
        assert call_everything(client, config, weights) > 20
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 16}
        schema = {"name": "x", "schema": {"const": ANSWER}}
        said = client.post(
            "/v1/chat/completions", json=chat | {"response_format": {"type": "json_schema", "json_schema": schema}}
        )
        assert ANSWER in said.text, "the test makes no answer that could be found"
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    log = server.log.read_text()
    assert log.count("request") > 50
    assert "debug" in log
    for secret in (CANARY, ANSWER):
        found = [line[:300] for line in log.splitlines() if secret in line.lower()]
        assert not found

"""Merges through the whole service: computed in a process of their own, stored, served as PEFT would, reproducible."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from safetensors.torch import load

from tests.support.models import save_tiny, tiny_model
from tests.support.peft_oracle import PeftOracle, random_lora
from tests.support.server_process import ServerProcess

PATIENCE = 300  # seconds until a test that hangs is failed; no test waits for it
PROMPT = "one base model, many adapters, one batch"
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16},
    "other": {"r": 4, "lora_alpha": 8},
    "rs": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "head": {"r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
}
SOURCES: list[dict[str, Any]] = [
    {"adapter": "plain"},
    {"adapter": "other", "weight": 0.5},
    {"adapter": "rs", "weight": -0.75},
]
CAT: dict[str, Any] = {"name": "sum", "method": "cat", "sources": SOURCES}


@dataclass(frozen=True)
class Service:
    server: ServerProcess
    client: httpx.Client
    oracle: PeftOracle

    def post(self, body: dict[str, Any], **parameters: Any) -> httpx.Response:
        return self.client.post("/merge", json=body, params=parameters)

    def made(self, body: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        answer = self.post(body, wait=True, **parameters)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def refused(self, body: dict[str, Any], status: int, code: str, **parameters: Any) -> None:
        answer = self.post(body, **parameters)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text

    def tokens(self, **body: Any) -> list[int]:
        parameters = {"max_new_tokens": 12, "details": True, "ignore_eos": True}
        answer = self.client.post("/generate", json={"inputs": PROMPT, "parameters": parameters, **body})
        return [token["id"] for token in answer.json()["details"]["tokens"]]

    def loss(self, examples: list[dict[str, str]], adapters: tuple[tuple[str, float], ...]) -> float:
        """What PEFT says of the answers' tokens, in nats each."""
        found: list[float] = []
        for example in examples:
            prompt, answer = (
                self.client.post("/tokenize", json={"prompt": example[part], "add_special_tokens": part == "prompt"})
                for part in ("prompt", "answer")
            )
            tokens, start = prompt.json()["tokens"] + answer.json()["tokens"], len(prompt.json()["tokens"])
            rows = self.oracle.logprobs(tokens, adapters)
            found += [float(rows[at - 1, tokens[at]]) for at in range(start, len(tokens))]
        return -sum(found) / len(found)

    def ended(self, job_id: str) -> dict[str, Any]:
        while True:
            job: dict[str, Any] = self.client.get(f"/jobs/{job_id}").json()
            if job["state"] not in ("queued", "running"):
                return job
            time.sleep(0.05)  # nothing to wait on but the answer


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("merging")
    model = tiny_model("llama")
    folders = {
        name: random_lora(root / name, model, seed, **told) for seed, (name, told) in enumerate(ADAPTERS.items())
    }
    options = ("--no-compile", "--kv-cache-memory", "8MiB", "--adapter-memory", "16MiB", "--max-rank", "24")
    base = save_tiny(root / "base", "llama")
    with (
        ServerProcess(str(base), root / "store", *options, log=root / "log") as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        for name, folder in folders.items():
            files = {
                part: (folder / file).read_bytes()
                for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors"))
            }
            assert client.put(f"/adapters/{name}", files=files).status_code == 201
        yield Service(server, client, PeftOracle(model, folders))


def test_the_exact_sum_is_served_as_all_its_adapters_together(service: Service) -> None:
    answer = service.post(CAT, wait=True)
    assert answer.status_code == 201
    info = answer.json()
    assert (info["kind"], info["forms"], info["rank"]) == ("lora", ["low_rank"], {"min": 12, "max": 16})
    digests = [service.client.get(f"/adapters/{each['adapter']}").json()["digest"] for each in SOURCES]
    told = info["provenance"]
    assert (told["type"], told["method"], told["parameters"]) == ("merge", "cat", {"mode": "corrected"})
    assert told["sources"] == [
        {"digest": digest, "weight": each.get("weight", 1.0)} for digest, each in zip(digests, SOURCES, strict=True)
    ]
    adapters = (("plain", 1.0), ("other", 0.5), ("rs", -0.75))
    tokenized = service.client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    expected, _ = service.oracle.greedy(tokenized, adapters, 12)
    assert service.tokens(adapter="sum") == expected
    assert service.tokens() != expected
    swapped = [SOURCES[0] | {"weight": 0.5}, SOURCES[1] | {"weight": 1.0}, SOURCES[2]]
    assert service.made(CAT | {"name": "swapped", "sources": swapped})["digest"] != info["digest"]


def test_the_same_recipe_gives_the_same_bytes(service: Service) -> None:
    body = {"name": "lego-1", "method": "lego", "sources": SOURCES, "parameters": {"rank": 6}}
    one = service.made(body)
    again = service.post(body, wait=True)
    assert (again.status_code, again.json()["version"], again.json()["digest"]) == (200, 1, one["digest"])
    job = service.post(body).json()
    assert (job["state"], job["result"]["new"], job["result"]["digest"]) == ("done", False, one["digest"])
    assert service.made(body | {"name": "lego-2"})["digest"] == one["digest"]
    assert service.made(body | {"name": "lego-3", "parameters": {"rank": 6, "seed": 1}})["digest"] != one["digest"]
    assert service.client.delete("/adapters/lego-1").status_code == 204
    assert service.made(body)["digest"] == one["digest"]


def test_peft_exact_knows_the_first_config(service: Service) -> None:
    """rsLoRA's trap: the merged scale is sqrt(rank), as in PEFT."""
    body = {"method": "svd", "parameters": {"mode": "peft_exact", "rank": 4}}
    exact = {}
    for name, order in (("first", ["rs", "other"]), ("second", ["other", "rs"])):
        service.made(body | {"name": name, "sources": [{"adapter": each} for each in order]})
        weights = load(service.client.get(f"/adapters/{name}/files/adapter_model.safetensors").content)
        found = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        exact[name] = weights[f"{found}B.weight"] @ weights[f"{found}A.weight"]
    ratio = exact["first"].norm() / exact["second"].norm()
    assert abs(float(ratio) - 2.0) < 1e-4


def test_a_search_finds_weights_that_make_the_examples_likelier(service: Service) -> None:
    """The examples are what one source answers; losses are PEFT's."""
    examples = []
    for prompt in ("one base model", "many adapters", "one batch"):
        told = {"inputs": prompt, "parameters": {"max_new_tokens": 8, "ignore_eos": True}}
        text = service.client.post("/generate?adapter=other", json=told).json()["generated_text"]
        examples.append({"prompt": prompt, "answer": text})
    sources = [{"adapter": "plain"}, {"adapter": "other"}]
    body: dict[str, Any] = {"name": "found", "method": "weight_search", "sources": sources}
    body["parameters"] = {"examples": examples, "iterations": 30}
    made = service.made(body)
    told = made["provenance"]
    weights = [source["weight"] for source in told["sources"]]
    assert told["parameters"]["examples"]["count"] == 3
    zero = body | {"name": "zero", "parameters": {"examples": examples, "iterations": 1}}
    base = service.made(zero)["provenance"]["loss"]
    assert told["loss"] < base
    assert abs(base - service.loss(examples, ())) < 1e-4
    assert abs(told["loss"] - service.loss(examples, (("plain", weights[0]), ("other", weights[1])))) < 1e-4
    assert service.made(body | {"name": "again-found"})["digest"] == made["digest"]
    swapped = service.loss(examples, (("plain", weights[1]), ("other", weights[0])))
    assert abs(told["loss"] - swapped) > 1e-3


def test_refusals_of_a_search(service: Service) -> None:
    examples = [{"prompt": "one base", "answer": " model"}]
    body: dict[str, Any] = {"name": "no", "method": "weight_search", "sources": [{"adapter": "plain"}]}
    changes: tuple[dict[str, Any], ...] = (
        {"parameters": {}},
        {"parameters": {"examples": [{"prompt": "a"}]}},
        {"parameters": {"examples": [{"prompt": "a", "answer": ""}]}},
        {"parameters": {"examples": examples * 65}},
        {"parameters": {"examples": examples}, "sources": [{"adapter": "plain", "weight": 0.5}]},
    )
    for change in changes:
        service.refused(body | change, 422, "bad_parameter")
    twice = body | {"parameters": {"examples": examples, "rank": 4}, "sources": body["sources"] * 2}
    service.refused(twice, 422, "bad_parameter", wait=True)
    long = {"examples": [{"prompt": "one " * 2000, "answer": "a"}], "rank": 4}
    service.refused(body | {"parameters": long}, 400, "context_length_exceeded", wait=True)
    assert service.client.get("/adapters/no").status_code == 404


def test_refusals(service: Service) -> None:
    body = {"name": "no", "method": "cat", "sources": SOURCES}
    service.refused(body | {"method": "lego9"}, 422, "unknown_method")
    service.refused(body | {"parameters": {"rank": 3}}, 422, "unknown_parameter")
    service.refused(body | {"method": "ties", "parameters": {"density": 2}}, 422, "bad_parameter")
    service.refused(body | {"sources": [{"adapter": "head"}]}, 422, "feature_unsupported")
    service.refused(body | {"sources": [{"adapter": "nobody"}]}, 404, "model_not_found")
    service.refused(body | {"name": "No/"}, 422, "bad_name")
    service.refused(body | {"sources": [{"adapter": "plain"}] * 4}, 422, "rank_limit")
    service.refused(
        body | {"method": "task_arithmetic", "sources": [{"adapter": "plain"}] * 4}, 422, "rank_limit", wait=True
    )
    service.refused(body | {"name": "plain"}, 409, "adapter_exists")
    headers = {"If-Match": f'"{"0" * 64}"'}
    answer = service.client.post("/merge", json=body | {"name": "plain"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (412, "digest_changed")
    assert service.client.get("/adapters/no").status_code == 404
    assert len(service.client.get("/adapters/plain/versions").json()["versions"]) == 1


def test_replacing_and_merging_merged_ones(service: Service) -> None:
    small = service.made(CAT | {"name": "again", "method": "linear", "parameters": {"rank": 5}})
    assert small["rank"] == {"min": 5, "max": 5}
    match = {"If-Match": f'"{small["digest"]}"'}
    body = {"name": "again", "method": "tsv", "sources": [{"adapter": "again"}, {"adapter": "other"}]}
    answer = service.client.post("/merge?wait=true", json=body, headers=match)
    assert (answer.status_code, answer.json()["version"]) == (201, 2)
    assert service.made(CAT | {"name": "again"}, replace=True)["version"] == 3
    assert len(service.tokens(adapter="again")) == 12


def test_compressed_sources(service: Service) -> None:
    for dtype in ("int8", "int4"):
        order = {"dtype": dtype, "target": f"small-{dtype}", "max_divergence": None}
        assert service.client.post("/adapters/plain/compress", json=order).status_code == 200
    sources = [{"adapter": "small-int8"}, {"adapter": "small-int4"}]
    assert service.made({"name": "of-small", "method": "core_space", "sources": sources})["rank"]["max"] <= 16


def test_kill_and_restart_and_cancel(service: Service) -> None:
    """The last test, for it ends the server: an unfinished merge is begun again under its id, a cancelled one not."""
    job = service.post(CAT | {"name": "late"}).json()
    service.server.kill()
    service.server.start()
    assert service.ended(job["id"])["result"]["name"] == "late"
    sums = [service.client.get(f"/adapters/{name}").json()["digest"] for name in ("late", "sum")]
    assert sums[0] == sums[1]
    one, two = (service.post(CAT | {"name": name}).json()["id"] for name in ("gone-1", "gone-2"))
    for job_id in (two, one):
        answer = service.client.delete(f"/jobs/{job_id}")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert service.client.get("/adapters/gone-1").status_code == 404
    assert service.server.stop() == 0
    service.server.start()
    assert service.client.get("/jobs").json() == {"jobs": []}

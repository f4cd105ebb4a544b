"""Generators through the whole service: trained in a process of their own, kept, asked for adapters that are served as
PEFT would serve them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapters_store.generation import generator_file
from adapters_store.generation.orders import NEW_TOKENS
from tests.support.models import EOS_ID, save_tiny, tiny_model
from tests.support.peft_oracle import PeftOracle, random_lora
from tests.support.server_process import ServerProcess

PATIENCE = 300  # seconds until a test that hangs is failed; no test waits for it
PROMPT = "one base model, many adapters, one batch"
EXAMPLES = ["the adapter answers", "one batch of many requests"]
SMALL: dict[str, Any] = {"latent": 8, "channels": [2, 3], "epochs": 4}
TASKS = ("law", "verse")
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
OTHERS: dict[str, dict[str, Any]] = {
    "wide": LORA | {"r": 4},
    "more": LORA | {"target_modules": ["q_proj", "k_proj"]},
    "sized": LORA | {"target_modules": ["q_proj", "o_proj"]},
    "head": LORA | {"modules_to_save": ["lm_head"]},
}
SOURCES = [{"adapter": f"{task}-{number}", "task": task} for task in TASKS for number in range(3)]


def vector(seed: int, length: int = 6) -> list[float]:
    numbers: list[float] = torch.randn(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return numbers


ORDER: dict[str, Any] = {
    "name": "icm",
    "sources": SOURCES,
    "tasks": {task: {"condition": vector(seed)} for seed, task in enumerate(TASKS)},
    "settings": SMALL,
}


@dataclass(frozen=True)
class Service:
    server: ServerProcess
    client: httpx.Client
    model: Any
    folders: dict[str, Path]

    def trained(self, body: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        answer = self.client.post("/generators", json=body, params={"wait": True, **parameters})
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def made(self, generator: str, name: str, status: int = 201, **body: Any) -> dict[str, Any]:
        answer = self.client.post(f"/generators/{generator}/adapters", json={"name": name, **body})
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def tokens(self, **body: Any) -> list[int]:
        parameters = {"max_new_tokens": 12, "details": True, "ignore_eos": True}
        answer = self.client.post("/generate", json={"inputs": PROMPT, "parameters": parameters, **body})
        return [token["id"] for token in answer.json()["details"]["tokens"]]

    def encoded(self, text: str) -> list[int]:
        tokens: list[int] = self.client.post("/tokenize", json={"prompt": text}).json()["tokens"]
        return tokens

    def exported(self, name: str) -> dict[str, bytes]:
        files = ("adapter_config.json", "adapter_model.safetensors")
        return {file: self.client.get(f"/adapters/{name}/files/{file}").content for file in files}

    def ended(self, job_id: str) -> dict[str, Any]:
        while True:
            job: dict[str, Any] = self.client.get(f"/jobs/{job_id}").json()
            if job["state"] not in ("queued", "running"):
                return job
            time.sleep(0.05)  # nothing to wait on but the answer


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("generators")
    model = tiny_model("llama")
    wanted = {source["adapter"]: LORA for source in SOURCES} | OTHERS
    folders = {
        name: random_lora(root / name, model, seed, scale=0.5, **told)
        for seed, (name, told) in enumerate(wanted.items())
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
        yield Service(server, client, model, folders)


def test_training_is_a_job_with_a_loss_curve(service: Service) -> None:
    answer = service.client.post("/generators", json=ORDER)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
    job = service.ended(answer.json()["id"])
    assert (job["kind"], job["state"], job["error"]) == ("generate", "done", None)
    made = job["result"]
    assert (made.pop("new"), made["name"], made["version"], made["event"]) == (True, "icm", 1, "train")
    assert service.client.get("/generators/icm").json() == made
    assert service.client.get("/generators").json() == {"generators": [made], "next": None}
    assert [loss["epoch"] for loss in made["losses"]] == [1, 2, 3, 4]
    assert made["losses"][-1]["reconstruction"] < made["losses"][0]["reconstruction"]
    assert (made["tasks"], made["condition"], made["latent"]) == (list(TASKS), 6, 8)
    assert (made["layout"]["targets"], made["layout"]["rank"]) == (["q_proj", "v_proj"], {"min": 2, "max": 2})
    told = made["provenance"]
    digests = [service.client.get(f"/adapters/{each['adapter']}").json()["digest"] for each in SOURCES]
    assert told["sources"] == [
        {"digest": digest, "task": each["task"]} for digest, each in zip(digests, SOURCES, strict=True)
    ]
    assert (told["settings"]["seed"], told["settings"]["icm"]["channels"]) == (0, [2, 3])
    assert service.client.get("/adapters/icm").status_code == 404
    lines = service.client.get("/metrics").text.splitlines()
    assert 'polyrank_jobs{kind="generate",state="done"} 1.0' in lines


def test_the_same_order_gives_the_same_digest(service: Service) -> None:
    one = service.client.get("/generators/icm").json()
    again = service.client.post("/generators", json=ORDER, params={"wait": True})
    assert (again.status_code, again.json()["digest"]) == (200, one["digest"])
    job = service.client.post("/generators", json=ORDER).json()
    assert (job["state"], job["result"]["new"], job["result"]["digest"]) == ("done", False, one["digest"])
    assert service.trained(ORDER | {"name": "icm-2"})["digest"] == one["digest"]
    other = service.trained(ORDER | {"name": "icm-3", "settings": SMALL | {"seed": 1}})
    assert other["digest"] != one["digest"]


def test_an_adapter_is_served_as_peft_serves_its_export(service: Service, tmp_path: Path) -> None:
    info = service.made("icm", "made", task="law", seed=3)
    generator = service.client.get("/generators/icm").json()
    assert (info["kind"], info["forms"], info["event"]) == ("icm_lora", ["low_rank"], "generate")
    assert (info["rank"], info["modules"]["matched"]) == ({"min": 2, "max": 2}, 6)
    assert info["proof"]["probe"]["max_change"] > 0
    assert info["proof"]["base"] == {"by": "fingerprint", "named": generator["base"]["id"]}
    told = info["provenance"]
    assert (told["type"], told["generator"], told["task"], told["seed"]) == ("generate", generator["digest"], "law", 3)
    assert told["sizes"]["recipe"] == info["bytes"]
    assert told["sizes"]["share"] == pytest.approx(info["bytes"] / told["sizes"]["lora"], rel=1e-5)
    assert told["sizes"]["break_even"] == generator["sizes"]["break_even"]
    folders = {}
    for name, task, seed in (("made", "law", 3), ("other", "verse", 3), ("drawn", "law", 4)):
        if name != "made":
            assert service.made("icm", name, task=task, seed=seed)["digest"] != info["digest"]
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for file, data in service.exported(name).items():
            (folders[name] / file).write_bytes(data)
    oracle = PeftOracle(service.model, folders)
    expected = {name: oracle.greedy(service.encoded(PROMPT), ((name, 1.0),), 12)[0] for name in folders}
    assert {name: service.tokens(adapter=name) for name in folders} == expected
    assert expected["made"] != expected["other"] != service.tokens()


def test_the_same_request_gives_the_same_adapter(service: Service) -> None:
    first = service.client.get("/adapters/made").json()
    again = service.made("icm", "made", 200, task="law", seed=3)
    assert (again["version"], again["digest"]) == (1, first["digest"])
    assert service.made("icm", "made-2", task="law", seed=3)["digest"] == first["digest"]
    by_digest = service.client.get("/generators/icm").json()["digest"]
    condition = ORDER["tasks"]["law"]["condition"]
    told: dict[str, Any] = {"condition": condition, "statistics_of": "law", "z": vector(9, 8)}
    pinned = service.made(f"sha256:{by_digest}", "pinned", **told)
    assert service.made("icm@1", "pinned", 200, **told)["digest"] == pinned["digest"]
    assert service.made("icm", "rebuilt", task="law", reconstruct=True)["provenance"]["reconstruct"] is True


def test_replacing(service: Service) -> None:
    held = service.client.get("/adapters/made").json()
    body = {"name": "made", "task": "law", "seed": 5}
    assert code(service.client.post("/generators/icm/adapters", json=body)) == (409, "adapter_exists")
    stale = {"If-Match": f'"{"0" * 64}"'}
    answer = service.client.post("/generators/icm/adapters", json=body, headers=stale)
    assert code(answer) == (412, "digest_changed")
    match = {"If-Match": f'"{held["digest"]}"'}
    answer = service.client.post("/generators/icm/adapters", json=body, headers=match)
    assert (answer.status_code, answer.json()["version"]) == (201, 2)
    answer = service.client.post("/generators/icm/adapters", json=body | {"seed": 3}, params={"replace": True})
    assert (answer.status_code, answer.json()["digest"]) == (201, held["digest"])


def hidden_states(service: Service, text: str, adapter: str | None) -> torch.Tensor:
    """The mean over the calls of transformers' own generation of what the last layer gives at the last position."""
    model = PeftOracle(service.model, service.folders)._adapt(((adapter, 1.0),) if adapter else ())
    layers = next(module for name, module in model.named_modules() if name.endswith("model.layers"))
    seen: list[torch.Tensor] = []
    hook = layers[-1].register_forward_hook(
        lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    tokens = torch.tensor([service.encoded(text)])
    mask = torch.ones_like(tokens)
    model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS_ID
    )
    hook.remove()
    return torch.stack(seen).mean(0)


def test_examples_make_the_conditions(service: Service, tmp_path: Path) -> None:
    """As transformers' hidden states say, of the base and with an adapter; and one generator's file serves another."""
    tasks = {"law": {"examples": EXAMPLES, "with_adapter": "law-0"}, "verse": {"examples": EXAMPLES}}
    info = service.trained(ORDER | {"name": "seen", "tasks": tasks})
    assert info["condition"] == 64
    data = service.client.get("/generators/seen/file").content
    path = tmp_path / "generator"
    path.write_bytes(data)
    found = generator_file.load(path)
    assert found.digest == info["digest"]
    for task, adapter in (("law", "law-0"), ("verse", None)):
        expected = torch.stack([hidden_states(service, text, adapter) for text in EXAMPLES]).mean(0)
        apart = (found.tasks[task].condition - expected).norm() / expected.norm()
        assert float(apart) < 1e-4
    told = info["provenance"]["tasks"]
    assert told["law"]["with_adapter"] == service.client.get("/adapters/law-0").json()["digest"]
    assert told["verse"]["with_adapter"] is None
    made = {
        with_adapter: service.made(
            "seen", f"seen-{with_adapter}", examples=EXAMPLES, with_adapter=with_adapter, statistics_of="law"
        )
        for with_adapter in ("law-0", "verse-0")
    }
    assert made["law-0"]["digest"] != made["verse-0"]["digest"]
    based = service.made("seen", "seen-base", examples=EXAMPLES, statistics_of="law")
    assert based["provenance"]["condition"] != made["law-0"]["provenance"]["condition"]


def test_upload(service: Service) -> None:
    info = service.client.get("/generators/icm").json()
    file = service.client.get("/generators/icm/file")
    assert file.headers["content-length"] == str(info["bytes"])
    answer = service.client.put("/generators/sent", content=file.content)
    assert (answer.status_code, answer.json()["digest"]) == (201, info["digest"])
    assert answer.headers["etag"] == f'"{info["digest"]}"'
    assert service.client.put("/generators/sent", content=file.content).status_code == 200
    other = service.client.get("/generators/icm-3/file").content
    assert code(service.client.put("/generators/sent", content=other)) == (409, "adapter_exists")
    match = {"If-Match": f'"{info["digest"]}"'}
    assert service.client.put("/generators/sent", content=other, headers=match).json()["version"] == 2
    for bad in (b"", file.content[:-1], b"\x80\x02}q\x00.", file.content + b"x"):
        assert code(service.client.put("/generators/bad", content=bad)) == (422, "generator_invalid")
    assert code(service.client.put("/generators/Bad", content=file.content)) == (422, "bad_name")
    answer = service.client.put("/generators/bad", files={"file": file.content})
    assert code(answer) == (415, "unsupported_media_type")
    assert service.client.delete("/generators/sent").status_code == 204
    assert code(service.client.get("/generators/sent")) == (404, "generator_not_found")


@pytest.mark.parametrize(
    ("changes", "status", "expected"),
    [
        ({"name": "No/"}, 422, "bad_name"),
        ({"name": "icm", "settings": SMALL | {"seed": 9}}, 409, "adapter_exists"),
        ({"sources": [*SOURCES, {"adapter": "nobody", "task": "law"}]}, 404, "model_not_found"),
        ({"sources": [*SOURCES, {"adapter": "wide", "task": "law"}]}, 422, "layouts_differ"),
        ({"sources": [*SOURCES, {"adapter": "more", "task": "law"}]}, 422, "layouts_differ"),
        ({"sources": [*SOURCES, {"adapter": "sized", "task": "law"}]}, 422, "layouts_differ"),
        ({"sources": [*SOURCES, {"adapter": "head", "task": "law"}]}, 422, "feature_unsupported"),
        ({"sources": [*SOURCES, {"adapter": "law-0", "task": "prose"}]}, 422, "missing_examples"),
        ({"sources": SOURCES[:1]}, 422, "unknown_task"),
        ({"sources": SOURCES[:1], "tasks": {"law": {"condition": vector(0)}}}, 422, "too_few_samples"),
        ({"tasks": {"law": {"condition": vector(0)}, "verse": {}}}, 422, "missing_examples"),
        ({"tasks": {"law": {"condition": vector(0)}, "verse": {"condition": vector(1, 5)}}}, 422, "bad_condition"),
        ({"tasks": {"law": {"condition": [0.0] * 65_537}, "verse": {}}}, 400, "invalid_parameter"),
        ({"tasks": {"law": {"condition": ["1"]}, "verse": {}}}, 400, "invalid_parameter"),
        ({"settings": {"epochs": 0}}, 422, "bad_parameter"),
        ({"settings": {"channels": [0]}}, 422, "bad_parameter"),
        ({"settings": {"latent": 1 << 40}}, 422, "bad_parameter"),
        ({"settings": {"epoch": 1}}, 422, "unknown_parameter"),
        ({"settings": SMALL | {"batch": 1024, "group": 1, "channels": [16] * 12}}, 422, "generator_too_large"),
    ],
)
def test_refused_trainings(service: Service, changes: dict[str, Any], status: int, expected: str) -> None:
    answer = service.client.post("/generators", json=ORDER | {"name": "no"} | changes, params={"wait": True})
    assert code(answer) == (status, expected), answer.text
    assert service.client.get("/generators/no").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        ({"task": "prose"}, 422, "unknown_task"),
        ({"task": "law", "statistics_of": "prose"}, 422, "unknown_task"),
        ({"condition": vector(0)}, 422, "unknown_task"),
        ({"seed": 1}, 422, "missing_examples"),
        ({"task": "law", "condition": vector(0)}, 422, "missing_examples"),
        ({"task": "law", "with_adapter": "law-0"}, 422, "missing_examples"),
        ({"examples": EXAMPLES, "with_adapter": "nobody", "statistics_of": "law"}, 404, "model_not_found"),
        ({"examples": EXAMPLES, "statistics_of": "law"}, 422, "bad_condition"),  # 64 numbers, not 6
        ({"condition": vector(0, 7), "statistics_of": "law"}, 422, "bad_condition"),
        ({"condition": [1e300] * 6, "statistics_of": "law"}, 422, "bad_condition"),
        ({"task": "law", "z": vector(0, 9)}, 422, "bad_latent"),
        ({"task": "law", "z": vector(0, 8), "seed": 1}, 422, "bad_latent"),
        ({"task": "law", "z": [1e300] * 8}, 422, "bad_latent"),
        ({"condition": vector(0), "statistics_of": "law", "reconstruct": True}, 422, "bad_latent"),
        ({"task": "law", "seed": -1}, 400, "invalid_parameter"),
        ({"task": "law", "name": "No/"}, 422, "bad_name"),
        ({"task": "law", "name": "law-0"}, 409, "adapter_exists"),
        ({"examples": ["word " * 400], "statistics_of": "law"}, 400, "context_length_exceeded"),
    ],
)
def test_refused_adapters(service: Service, body: dict[str, Any], status: int, expected: str) -> None:
    answer = service.client.post("/generators/icm/adapters", json={"name": "no", **body})
    assert code(answer) == (status, expected), answer.text
    assert service.client.get("/adapters/no").status_code == 404


def test_numbers_that_are_none(service: Service) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        text = f'{{"name": "no", "statistics_of": "law", "condition": [{number}, 0, 0, 0, 0, 0]}}'
        headers = {"Content-Type": "application/json"}
        answer = service.client.post("/generators/icm/adapters", content=text, headers=headers)
        assert answer.status_code == 400, answer.text
    unknown = service.client.post("/generators/nobody/adapters", json={"name": "no", "task": "law"})
    assert code(unknown) == (404, "generator_not_found")
    assert code(service.client.get("/generators/nobody/file")) == (404, "generator_not_found")
    assert code(service.client.delete("/generators/nobody")) == (404, "generator_not_found")
    assert code(service.client.delete("/generators/icm@1")) == (400, "name_expected")


def test_kill_and_restart_and_cancel(service: Service) -> None:
    """The last test, for it ends the server: an unfinished training is begun again under its id, a cancelled one not;
    generated adapters come back with the same bytes, also where their generator's name is gone."""
    before = service.exported("made"), service.tokens(adapter="made")
    digest = service.client.get("/generators/icm").json()["digest"]
    assert service.client.delete("/generators/icm").status_code == 204
    job = service.client.post("/generators", json=ORDER | {"name": "late"}).json()
    service.server.kill()
    service.server.start()
    assert (service.exported("made"), service.tokens(adapter="made")) == before
    assert service.ended(job["id"])["result"]["digest"] == digest
    endless = SMALL | {"epochs": 100_000}
    one, two = (
        service.client.post("/generators", json=ORDER | {"name": name, "settings": endless}).json()["id"]
        for name in ("gone-1", "gone-2")
    )
    while service.client.get(f"/jobs/{one}").json()["progress"] <= 0.05:
        time.sleep(0.05)  # nothing to wait on but the answer
    for job_id in (two, one):
        answer = service.client.delete(f"/jobs/{job_id}")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert service.client.get("/generators/gone-1").status_code == 404

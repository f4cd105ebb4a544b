"""Over HTTP, with the real server: what was acknowledged survives a restart and kill -9, answers included."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.models import save_tiny, tiny_model
from tests.support.peft_oracle import PeftOracle, random_lora
from tests.support.server_process import ServerProcess

KILLS = 3  # at the store itself 50 are done, in tests/adapters_store; here the whole service dies
PROMPT = "the adapter answers the question"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("restart")
    model = tiny_model("llama")
    made = {"base": save_tiny(root / "base", "llama")}
    for seed in range(4):
        made[f"a{seed}"] = random_lora(root / f"a{seed}", model, seed, r=4, lora_alpha=8)
    return made


def upload(client: httpx.Client, name: str, folder: Path) -> httpx.Response:
    with (
        (folder / "adapter_config.json").open("rb") as config,
        (folder / "adapter_model.safetensors").open("rb") as weights,
    ):
        return client.put(f"/adapters/{name}", files={"config": config, "weights": weights})


def generate(client: httpx.Client, adapter: str | None) -> list[int]:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "details": True, "ignore_eos": True}}
    response = client.post("/generate", json=body, params={"adapter": adapter} if adapter else {})
    response.raise_for_status()
    return [token["id"] for token in response.json()["details"]["tokens"]]


def test_kills_during_uploads_lose_nothing_acknowledged(folders: dict[str, Path], tmp_path: Path) -> None:
    chance = random.Random(4)
    acknowledged: dict[str, str] = {}
    server = ServerProcess(str(folders["base"]), tmp_path / "store", "--no-compile", log=tmp_path / "log")
    for round_number in range(KILLS):
        with server, httpx.Client(base_url=server.url, timeout=60) as client:
            for name, digest in acknowledged.items():
                assert client.get(f"/adapters/{name}").json()["digest"] == digest
            enough = threading.Event()
            wanted = chance.randint(2, 12)

            def uploads(
                thread: int, enough: threading.Event = enough, wanted: int = wanted, r: int = round_number
            ) -> None:
                with httpx.Client(base_url=server.url, timeout=60) as own:
                    for number in range(1000):
                        name = f"k{r}-{thread}-{number}"
                        try:
                            response = upload(own, name, folders[f"a{number % 4}"])
                        except httpx.TransportError:
                            return
                        assert response.status_code == 201, response.text
                        acknowledged[name] = response.json()["digest"]
                        if len(acknowledged) >= wanted * (r + 1):
                            enough.set()

            with ThreadPoolExecutor(3) as threads:
                running = [threads.submit(uploads, thread) for thread in range(3)]
                assert enough.wait(timeout=120)
                server.kill()
                for done in running:
                    done.result()
    with server, httpx.Client(base_url=server.url, timeout=60) as client:
        listed: dict[str, str] = {}
        cursor = None
        while True:
            page = client.get("/adapters", params={"cursor": cursor} if cursor else {}).json()
            listed |= {info["name"]: info["digest"] for info in page["adapters"]}
            if not (cursor := page["next"]):
                break
        assert acknowledged.items() <= listed.items()
        assert len(listed) <= len(acknowledged) + 3 * KILLS  # an upload may be done and its answer lost
        assert not list((tmp_path / "store" / "staging").iterdir())
        oracle = PeftOracle(tiny_model("llama"), folders)
        tokenizer_ids = client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
        for name in chance.sample(sorted(listed), 4):
            source = f"a{int(name.rsplit('-', 1)[1]) % 4}"
            assert generate(client, name) == oracle.greedy(tokenizer_ids, ((source, 1.0),), 8)[0]
        assert server.stop() == 0

"""The main job on real input: the default model, the example adapters preloaded, all tasks asked at the same time."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx

from adapters_store.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from deploy.examples.evaluate import ADAPTERS, from_server
from deploy.examples.tasks import TASKS
from deploy.examples.train_smora import FOLDER
from tests.support.real_server import RealServer

ITEMS = 8  # per task; `python -m deploy.examples.evaluate` asks 64


def test_every_example_adapter_does_what_the_base_cannot(real: RealServer) -> None:
    """Each task's questions go to its own adapter, to another task's and to the base, mixed in one batch."""
    answer = from_server(real.url, concurrency=1)
    names = sorted(TASKS)
    jobs = [
        (name, adapter, item)
        for name, other in zip(names, [*names[1:], names[0]], strict=True)
        for item in TASKS[name].items("heldout", ITEMS, seed=1)
        for adapter in (name, other, None)
    ]
    with ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(lambda job: answer(job[1], [job[2].prompt], TASKS[job[0]].max_new_tokens)[0], jobs))
    right: dict[tuple[str, str], int] = {}
    for (name, adapter, item), text in zip(jobs, texts, strict=True):
        kind = "own" if adapter == name else "base" if adapter is None else "other"
        right[name, kind] = right.get((name, kind), 0) + TASKS[name].correct(item, text)
    for name in names:
        assert right[name, "own"] >= 0.85 * ITEMS, right
        assert right[name, "other"] <= 0.75 * ITEMS, right  # labels can be guessed, nothing else
        assert right[name, "base"] <= 0.75 * ITEMS, right
    assert sum(right[name, "base"] for name in names) < 0.2 * ITEMS * len(names), right


def test_push_and_generate_from_the_command_line(real: RealServer) -> None:
    """What the README tells a newcomer to do with an adapter folder."""

    def polyrank(*arguments: str) -> str:
        command = [sys.executable, "-m", "server", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"POLYRANK_URL": real.url})
        return done.stdout

    name = sorted(TASKS)[0]
    item = TASKS[name].items("heldout", 1, seed=3)[0]
    polyrank("push", "my-own", str(ADAPTERS / name))
    assert "my-own" in polyrank("ls")
    answer = polyrank("generate", "--adapter", "my-own", "--max-new-tokens", "40", "--stop", "\n", item.prompt)
    assert TASKS[name].correct(item, answer)
    polyrank("rm", "my-own")
    assert httpx.get(f"{real.url}/adapters/my-own").status_code == 404


def test_a_disconnect_frees_everything(real: RealServer) -> None:
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 2000, "ignore_eos": True}}
    with httpx.Client(base_url=real.url, timeout=60) as client:
        with client.stream("POST", "/generate_stream", json=body) as stream:
            next(stream.iter_lines())
            assert gauge(client, "polyrank_running") == 1
        for _ in range(1000):
            if gauge(client, "polyrank_running") == 0:
                break
        assert gauge(client, "polyrank_running") == 0
        assert gauge(client, "polyrank_kv_usage") == 0


def gauge(client: httpx.Client, name: str) -> float:
    line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])


def test_each_task_has_its_adapter() -> None:
    assert {folder.name for folder in ADAPTERS.iterdir()} == set(TASKS)


def test_one_smora_adapter_does_all_tasks(real: RealServer) -> None:
    """Uploaded beside the others; its ranks are counted."""
    files = {name: (FOLDER / file).read_bytes() for name, file in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE))}
    with httpx.Client(base_url=real.url, timeout=300) as client:
        assert client.put(f"/adapters/{FOLDER.name}", files=files).status_code == 201
        answer = from_server(real.url, concurrency=8)
        right = 0
        for name, task in sorted(TASKS.items()):
            items = task.items("heldout", ITEMS, seed=1)
            texts = answer(FOLDER.name, [item.prompt for item in items], TASKS[name].max_new_tokens)
            right += sum(task.correct(item, text) for item, text in zip(items, texts, strict=True))
        assert right >= 0.8 * ITEMS * len(TASKS), right
        told = client.get(f"/adapters/{FOLDER.name}/experts").json()
        assert told["entropy"] > 0.7
        assert {(module["rank"], module["active"]) for module in told["modules"].values()} == {(32, 4)}
        client.delete(f"/adapters/{FOLDER.name}")

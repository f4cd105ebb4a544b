"""Four servers over one store: a linear history per name, and nothing old after the bound. With Redis, and without."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.replicas.fresh_names import BOUND_SECONDS
from tests.e2e.replicas import CONTENTS, Clients, servers
from tests.support.history import check
from tests.support.models import save_tiny, tiny_model
from tests.support.peft_oracle import random_lora
from tests.support.redis_server import RedisServer, require_redis, until
from tests.support.server_process import ServerProcess

SERVERS, THREADS = 4, 4
ALONE = 2  # servers without Redis: the store is all that they share, and two take less time to start
NAMES = [f"n{number}" for number in range(5)]
DEEP = pytest.mark.deep


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("contents")
    model = tiny_model("llama", num_hidden_layers=1)
    made = {"base": save_tiny(root / "base", "llama", num_hidden_layers=1)}
    for seed in range(CONTENTS):
        made[f"a{seed}"] = random_lora(root / f"a{seed}", model, seed, r=2, lora_alpha=4)
    return made


@pytest.fixture(scope="module", params=["redis", "alone"])
def cluster(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[ServerProcess], RedisServer | None]]:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "alone":
        with servers(ALONE, folders["base"], root) as made:
            yield made, None
        return
    require_redis()
    with RedisServer(root) as redis, servers(SERVERS, folders["base"], root, "--redis", redis.url) as made:
        yield made, redis


Cluster = tuple[list[ServerProcess], RedisServer | None]


def run(clients: Clients, count: int, seed: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """`count` mixed calls from several threads, then reads everywhere after the bound; the judge looks at all."""
    names = [f"s{seed}-{name}" for name in NAMES]
    with ThreadPoolExecutor(THREADS + 1) as threads:
        shares = [count // THREADS + (number < count % THREADS) for number in range(THREADS)]
        running = [
            threads.submit(clients.mix, random.Random(f"{seed} {number}"), names, share)
            for number, share in enumerate(shares)
        ]
        running.append(threads.submit(meanwhile))
        for done in running:
            done.result()
    acknowledged = time.time()
    until(lambda: time.time() >= acknowledged + BOUND_SECONDS, 60, "the bound passes")
    for server in range(clients.count):
        for name in names:
            clients.read(server, name)
            clients.generate(server, name)
    logs = {name: clients.versions(0, name) for name in names}
    for server in range(1, clients.count):
        assert {name: clients.versions(server, name) for name in names} == logs
    check(clients.operations, logs, BOUND_SECONDS)
    assert any(len(log) > 1 for log in logs.values()), "nothing happened"


def test_fifty_mixed_operations(cluster: Cluster, folders: dict[str, Path]) -> None:
    made, _ = cluster
    with Clients([server.url for server in made], folders) as clients:
        run(clients, 50, seed=1)


@DEEP
@pytest.mark.parametrize("seed", range(2, 5))
def test_five_hundred_mixed_operations_and_a_server_killed(
    cluster: Cluster, folders: dict[str, Path], seed: int
) -> None:
    made, _ = cluster
    with Clients([server.url for server in made], folders) as clients:

        def kill_one() -> None:
            until(lambda: len(clients.operations) > 150, 300, "150 operations")
            made[-1].kill()
            until(lambda: len(clients.operations) > 300, 300, "300 operations")
            made[-1].start()

        run(clients, 500, seed, kill_one)


def test_an_upload_is_served_by_all_others_at_once(cluster: Cluster, folders: dict[str, Path]) -> None:
    made, _ = cluster
    with Clients([server.url for server in made], folders) as clients:
        stored = clients.upload(0, "at-once", "a0")
        assert stored is not None
        for server in range(1, clients.count):
            answer = clients.generate(server, "at-once")
            assert answer is not None
            assert answer.status_code == 200
            assert answer.headers["X-Adapter-Digest"] == stored.json()["digest"]


def test_a_replacement_is_seen_in_time_by_servers_that_use_the_name(cluster: Cluster, folders: dict[str, Path]) -> None:
    """Each asks for the name without a pause, so that it always has an answer that it might keep."""
    made, redis = cluster
    with Clients([server.url for server in made], folders) as clients:
        clients.upload(0, "in-use", "a0")
        seen: dict[int, float] = {}
        replaced = threading.Event()
        wanted: list[str] = []

        def use(server: int) -> None:
            while server not in seen:
                asked, ready = time.monotonic(), replaced.is_set()
                answer = clients.generate(server, "in-use")
                assert answer is not None
                if ready and answer.headers["X-Adapter-Digest"] == wanted[0]:
                    seen[server] = asked

        with ThreadPoolExecutor(SERVERS) as threads:
            running = [threads.submit(use, server) for server in range(1, clients.count)]
            until(lambda: len(clients.operations) > 30, 60, "the name is in use everywhere")
            stored = clients.upload(0, "in-use", "a1")
            acknowledged = time.monotonic()
            assert stored is not None
            wanted.append(stored.json()["digest"])
            replaced.set()
            for done in running:
                done.result()
        print({server: round(moment - acknowledged, 3) for server, moment in seen.items()}, "with", redis)
        check(clients.operations, {"in-use": clients.versions(1, "in-use")}, BOUND_SECONDS)


def test_listings_follow_and_replicas_know_each_other(cluster: Cluster, folders: dict[str, Path]) -> None:
    made, redis = cluster
    with Clients([server.url for server in made], folders) as clients:
        clients.upload(1, "listed", "a2")

    def listed() -> bool:
        answers = [httpx.get(f"{server.url}/adapters?limit=1000", timeout=30).json() for server in made]
        return all("listed" in {info["name"] for info in answer["adapters"]} for answer in answers)

    until(listed, 60, "every server lists what one was given")
    if redis is not None:

        def all_known() -> bool:
            told = [httpx.get(f"{server.url}/replicas", timeout=30).json()["replicas"] for server in made]
            return all({each["address"] for each in each_told} == {server.url for server in made} for each_told in told)

        until(all_known, 60, "every server knows the others")

"""A real server with keys: they come and go while it runs, tenants stay apart, and everything changed is on record."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.access.key import SCOPES, Key, Keyring, TenantQuota, digest, new_secret, utc_now
from server.access.key_file import KeyFile
from tests.support.api_keys import bearer
from tests.support.models import save_tiny, tiny_model
from tests.support.nursery import BornServer, Nursery
from tests.support.peft_oracle import random_lora
from tests.support.redis_server import until

OPTIONS = ("--no-compile", "--kv-cache-memory", "4MiB", "--adapter-memory", "4MiB", "--device-memory", "8MiB")
PROMPT = "the adapter of the tenant " * 8  # several blocks of the prefix cache


@dataclass
class Guarded:
    """A server with keys, and the folders of adapters `a0`, `a1`, ..."""

    server: BornServer
    place: KeyFile
    path: Path
    audit: Path
    folders: list[Path]

    def make(self, *scopes: str, known: bool = True, **facts: Any) -> str:
        """A new key; the server knows it already, unless it is never to be right."""
        made: list[str] = []

        def edit(ring: Keyring) -> Keyring:
            secret, key_id = new_secret(ring)
            made.append(secret)
            told = {"created": utc_now(), "scopes": scopes or SCOPES - {"admin"}, **facts}
            return ring.with_key(Key(id=key_id, sha256=digest(secret), **told))

        self.place.change(edit)
        if known:
            until(lambda: self.ask("GET", "/info", made[-1]).status_code != 401, 30, "the key is known")
        return made[-1]

    def revoke(self, secret: str) -> None:
        def edit(ring: Keyring) -> Keyring:
            key = ring.find(secret[:11])
            assert key is not None
            return ring.with_key(key.model_copy(update={"revoked": utc_now()}))

        self.place.change(edit)

    def ask(self, method: str, path: str, secret: str | None, **options: Any) -> httpx.Response:
        return httpx.request(method, self.server.url + path, headers=bearer(secret), timeout=300, **options)

    def answers(self, secret: str, status: int) -> bool:
        return self.ask("GET", "/info", secret).status_code == status

    def upload(self, name: str, number: int, secret: str, query: str = "") -> httpx.Response:
        folder = self.folders[number]
        config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        files = {"config": config.read_bytes(), "weights": weights.read_bytes()}
        return self.ask("PUT", f"/adapters/{name}{query}", secret, files=files)

    def generate(self, secret: str, adapter: str, prompt: str = PROMPT) -> dict[str, Any]:
        parameters = {"max_new_tokens": 6, "details": True}
        answer = self.ask(
            "POST", f"/generate?adapter={adapter}", secret, json={"inputs": prompt, "parameters": parameters}
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def metric(self, name: str, secret: str) -> float:
        families = text_string_to_metric_families(self.ask("GET", "/metrics", secret).text)
        return next(sample.value for family in families for sample in family.samples if sample.name == name)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture(scope="module")
def guarded(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    root = tmp_path_factory.mktemp("keys")
    base = save_tiny(root / "base", "llama", num_hidden_layers=1)
    model = tiny_model("llama", num_hidden_layers=1)
    folders = [random_lora(root / f"a{seed}", model, seed, r=2, lora_alpha=16) for seed in range(6)]
    path, audit = root / "keys.json", root / "audit.log"
    place = KeyFile(path)
    place.change(lambda ring: ring)
    options = ("--model", str(base), "--store", str(root / "store"), "--api-keys", str(path), "--audit-log", str(audit))
    with BornServer(nursery, *OPTIONS, *options, log=root / "server.log") as server:
        yield Guarded(server, place, path, audit, folders)


def test_keys_are_made_and_revoked_while_it_runs(guarded: Guarded) -> None:
    secret = guarded.make("generate")
    assert guarded.generate(secret, "base")["generated_text"]
    guarded.revoke(secret)
    until(lambda: guarded.ask("GET", "/info", secret).status_code == 401, 30, "the key is refused")
    assert guarded.ask("POST", "/generate", secret, json={"inputs": "a"}).json()["error_type"] == "invalid_api_key"


def test_a_key_ends_at_its_time(guarded: Guarded) -> None:
    secret = guarded.make(expires=utc_now() + timedelta(seconds=4))
    until(lambda: guarded.ask("GET", "/adapters", secret).status_code == 401, 30, "the key has ended")


def test_a_broken_file_changes_nothing_but_a_metric(guarded: Guarded) -> None:
    secret = guarded.make()
    whole = guarded.path.read_bytes()
    assert guarded.metric("polyrank_api_keys_stale", secret) == 0
    guarded.path.write_bytes(whole[:-20])
    until(lambda: guarded.metric("polyrank_api_keys_stale", secret) == 1, 30, "the metric says so")
    assert guarded.generate(secret, "base")["generated_text"]
    assert guarded.ask("GET", "/ready", None).status_code == 200
    guarded.path.write_bytes(whole)
    until(lambda: guarded.metric("polyrank_api_keys_stale", secret) == 0, 30, "it is read again")


def test_tenants_of_one_name_get_their_own_content(guarded: Guarded) -> None:
    acme, globex = guarded.make(tenant="acme"), guarded.make(tenant="globex")
    public = guarded.make("adapters:write", "generate")
    for secret, number in ((public, 0), (acme, 1), (globex, 2)):
        made = guarded.upload("same", number, secret)
        assert (made.status_code, made.json()["version"]) == (201, 1)
    said = [guarded.generate(secret, "same")["details"]["tokens"] for secret in (public, acme, globex)]
    assert said[0] != said[1] != said[2] != said[0]
    alone = [guarded.upload(f"alone{number}", number, public).status_code for number in (0, 1, 2)]
    assert alone == [201, 201, 201]
    assert [guarded.generate(public, f"alone{number}")["details"]["tokens"] for number in (0, 1, 2)] == said
    only = guarded.upload("only", 3, acme).json()["digest"]
    for reference in ("only", f"sha256:{only}"):
        stranger = guarded.ask("POST", f"/generate?adapter={reference}", globex, json={"inputs": "a"})
        assert (stranger.status_code, stranger.json()["error_type"]) == (404, "model_not_found")
    listed = {info["name"]: info["tenant"] for info in guarded.ask("GET", "/adapters", globex).json()["adapters"]}
    assert "only" not in listed
    assert (listed["same"], listed["alone0"]) == ("globex", "public")


def test_no_prefix_is_shared_between_tenants(guarded: Guarded) -> None:
    """The same adapter, the same prompt: hits for the tenant that has sent it before, none for any other."""
    watcher = guarded.make("metrics")
    public = guarded.make("adapters:write")
    assert guarded.upload("shared", 4, public).status_code == 201
    tenants = [guarded.make("generate", tenant=tenant) for tenant in ("one", "two")]
    for adapter in ("shared", "base"):
        prompt = f"{adapter} {PROMPT}"
        hits = []
        for secret in (tenants[0], tenants[1], tenants[0], tenants[1]):
            before = guarded.metric("polyrank_prefix_hit_tokens_total", watcher)
            guarded.generate(secret, adapter, prompt)
            hits.append(guarded.metric("polyrank_prefix_hit_tokens_total", watcher) - before)
        assert hits[:2] == [0, 0], adapter
        assert hits[2] == hits[3] > 0


def test_uploads_at_once_keep_the_quota(guarded: Guarded) -> None:
    guarded.place.change(lambda ring: ring.with_quota("small", TenantQuota(adapters=2)))
    secret = guarded.make(tenant="small")
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda number: guarded.upload(f"n{number}", number, secret), range(6)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [201, 201, 403, 403, 403, 403]
    refused = next(answer.json()["error"] for answer in answers if answer.status_code == 403)
    assert refused["code"] == "quota_exceeded"
    own = [each for each in guarded.ask("GET", "/adapters", secret).json()["adapters"] if each["tenant"] == "small"]
    assert len(own) == 2
    merge = {"name": "m", "method": "linear", "sources": [{"adapter": own[0]["name"]}, {"adapter": own[1]["name"]}]}
    assert guarded.ask("POST", "/merge", secret, json=merge).json()["error"]["code"] == "quota_exceeded"


def test_a_merge_of_public_adapters_is_the_tenants_own(guarded: Guarded) -> None:
    public, secret = guarded.make("adapters:write"), guarded.make(tenant="merging")
    for number in (0, 1):
        guarded.upload(f"source{number}", number, public)
    order = {"name": "source0", "method": "linear", "sources": [{"adapter": "source0"}, {"adapter": "source1"}]}
    made = guarded.ask("POST", "/merge?wait=true", secret, json=order)
    assert (made.status_code, made.json()["tenant"], made.json()["version"]) == (201, "merging", 1)
    assert guarded.ask("GET", "/adapters/source0", guarded.make()).json()["digest"] != made.json()["digest"]
    found = {line["action"]: line for line in guarded.lines() if line["digest"] == made.json()["digest"]}
    ordered, ended = found["POST /merge"], found["job merge"]
    assert (ordered["key"], ordered["status"]) == (secret[:11], 201)
    assert ended["job"] == ordered["job"]
    small = guarded.ask("POST", "/adapters/source1/compress", secret, json={"max_divergence": None})
    assert (small.status_code, small.json()["tenant"], small.json()["version"]) == (200, "merging", 1)


RAW = (
    b"GET http://localhost/adapters HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://x/health/../adapters HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET //adapters HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%61dapters HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health/%2e%2e/adapters HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health/..%2fadapters HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health?/../adapters#/adapters HTTP/1.1\r\nHost: localhost/adapters\r\n\r\n",
    b"GET /adapters;/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /adapters HTTP/1.1\r\nHost: localhost/health?x=\r\n\r\n",
    b"GET /adapters HTTP/1.1\r\nHost: localhost\r\nHost: x/health\r\n\r\n",
    b"GET /adapters HTTP/1.0\r\n\r\n",
    b"GET /adapters HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Prefix: /health\r\nX-Original-URL: /health\r\n\r\n",
    b"GET /adapters HTTP/1.1\r\nHost: localhost\r\nAuthorization : Bearer x\r\n\r\n",
    b"GET /adapters HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer\x00x\r\n\r\n",
    b"DELETE /adapters/same HTTP/1.1\r\nHost: localhost\r\nX-HTTP-Method-Override: GET\r\n\r\n",
    b"POST /merge HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
)


@pytest.mark.parametrize("request_bytes", RAW, ids=lambda raw: raw[:60].decode("latin-1").split("\r")[0])
def test_no_wording_of_a_request_goes_past_the_keys(guarded: Guarded, request_bytes: bytes) -> None:
    """As bytes on the wire, before any parser has read them."""
    with socket.create_connection(("127.0.0.1", guarded.server.port), timeout=30) as connection:
        connection.sendall(request_bytes)
        answer = connection.recv(1 << 16)
    status = int(answer.split(b" ")[1])
    assert status in (400, 401, 404, 405) or b'{"status":"ok"}' in answer, answer
    assert b'"adapters"' not in answer


def test_the_command_line_sends_its_key(guarded: Guarded, tmp_path: Path) -> None:
    def polyrank(*arguments: str | Path, key: str | None) -> subprocess.CompletedProcess[str]:
        environment = {"POLYRANK_URL": guarded.server.url, "PATH": "", "POLYRANK_API_KEY": key or ""}
        command = [sys.executable, "-m", "server", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    secret = guarded.make(tenant="cli")
    without = polyrank("push", "mine", guarded.folders[5], key=None)
    assert (without.returncode, "missing_api_key" in without.stderr, "POLYRANK_API_KEY" in without.stderr) == (1, 1, 1)
    assert polyrank("push", "mine", guarded.folders[5], key=secret).returncode == 0
    assert '"tenant": "cli"' in polyrank("show", "mine", "--json", key=secret).stdout
    assert polyrank("show", "mine", key=guarded.make(tenant="other")).returncode == 1


def test_the_log_and_the_record_hold_no_key(guarded: Guarded) -> None:
    secret = guarded.make()
    guarded.upload("logged", 0, secret)
    guarded.ask("DELETE", "/adapters/logged", secret)
    lines = [line for line in guarded.lines() if line["name"] == "logged"]
    assert [(line["action"], line["key"], line["status"]) for line in lines] == [
        ("PUT /adapters/{name}", secret[:11], 201),
        ("DELETE /adapters/{name}", secret[:11], 204),
    ]
    told = guarded.server.log.read_text() + guarded.audit.read_text()
    assert secret[:11] in told
    assert secret[12:] not in told


@pytest.mark.deep
def test_changes_are_seen_within_two_seconds(guarded: Guarded) -> None:
    """20 keys, made and revoked; for a machine that is not busy."""
    worst = 0.0
    for _ in range(20):
        secret = guarded.make(known=False)
        worst = max(worst, until(partial(guarded.answers, secret, 200), 30, "the new key is known"))
        guarded.revoke(secret)
        worst = max(worst, until(partial(guarded.answers, secret, 401), 30, "the key is refused"))
    assert worst < 2.0

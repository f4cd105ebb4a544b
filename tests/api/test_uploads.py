"""`PUT /adapters/{name}`: what is taken, what is refused, and that nothing is left behind."""

import asyncio
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters_store.errors import AdapterInvalid, StorageFull, UnsupportedFormat
from adapters_store.info import AdapterInfo
from server.api import uploads
from server.api.application import create_api
from server.api.multipart import PartReader
from server.api.services import ApiSettings, Services
from server.metrics import Metrics
from tests.api.asgi import Call, until
from tests.api.events import openai_error
from tests.api.fake_registry import CONFIG, FakeRegistry

Client = httpx.AsyncClient
WEIGHTS = b"\x08\x00\x00\x00\x00\x00\x00\x00{}      \r\n-\r--b\n--b\r\n--"  # nearly the boundary, several times
MULTIPART = {"content-type": "multipart/form-data; boundary=b"}


def part(name: str, data: bytes, extra: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n%s\r\n' % (name.encode(), extra, data)


async def put(client: Client, name: str = "new", weights: bytes = WEIGHTS, **how: Any) -> httpx.Response:
    return await client.put(f"/adapters/{name}", files={"config": CONFIG, "weights": weights}, **how)


async def put_raw(client: Client, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    return await client.put("/adapters/new", content=body, headers=headers or MULTIPART)


@pytest.fixture(autouse=True)
def nothing_is_left(settings: ApiSettings) -> Iterator[None]:
    yield
    assert not list(settings.staging.iterdir())


async def test_a_new_adapter(client: Client, registry: FakeRegistry) -> None:
    answer = await put(client)
    assert answer.status_code == 201
    body = answer.json()
    assert (body["name"], body["version"]) == ("new", 1)
    assert answer.headers["etag"] == f'"{body["digest"]}"'
    assert answer.headers["location"] == "/adapters/new@1"
    assert registry.content[body["digest"]] == (CONFIG, WEIGHTS)


async def test_the_same_again_changes_nothing(client: Client, registry: FakeRegistry) -> None:
    first = await put(client)
    second = await put(client)
    assert second.status_code == 200
    assert second.json() == first.json()
    assert len(registry.names["public", "new"]) == 1


async def test_other_content_needs_leave(client: Client, registry: FakeRegistry) -> None:
    digest = (await put(client)).json()["digest"]
    answer = await put(client, weights=b"other")
    openai_error(answer, 409, "adapter_exists")
    assert answer.headers["x-should-retry"] == "false"
    openai_error(await put(client, weights=b"other", headers={"If-Match": f'"{"0" * 64}"'}), 412, "digest_changed")
    assert (await put(client, weights=b"other", headers={"If-Match": f'"{digest}"'})).status_code == 201
    assert (await put(client, weights=b"third", params={"replace": "true"})).json()["version"] == 3


async def test_client_filenames_are_not_used(client: Client, registry: FakeRegistry, tmp_path: Path) -> None:
    files = {"config": ("../../etc/passwd", CONFIG), "weights": ("x\0" * 900, WEIGHTS)}
    answer = await client.put("/adapters/new", files=files)
    assert answer.status_code == 201
    assert registry.seen_paths[0].parent == tmp_path / "staging"
    assert registry.seen_paths[0].name.isalnum()


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_bytes_may_come_in_any_pieces(api: FastAPI, registry: FakeRegistry, size: int) -> None:
    body = part("config", CONFIG) + part("weights", WEIGHTS * 20) + b"--b--\r\n"
    call = Call(api, "PUT", "/adapters/new", headers=MULTIPART)
    for start in range(0, len(body), size):
        call.send(body[start : start + size], more=start + size < len(body))
    async with call:
        await call.whole()
        assert call.status == 201
    assert registry.added[-1].bytes == len(WEIGHTS * 20)


async def test_a_large_upload_goes_to_disk_in_batches(client: Client, registry: FakeRegistry) -> None:
    weights = bytes(range(256)) * (12 << 10)
    assert (await put(client, weights=weights)).status_code == 201
    assert registry.content[registry.added[-1].digest][1] == weights


BAD_FORMS = {
    "no weights": part("config", CONFIG) + b"--b--\r\n",
    "no config": part("weights", WEIGHTS) + b"--b--\r\n",
    "nothing": b"--b--\r\n",
    "empty": b"",
    "twice": part("config", CONFIG) * 2 + part("weights", b"x") + b"--b--\r\n",
    "weights twice": part("config", CONFIG) + part("weights", b"x") * 2 + b"--b--\r\n",
    "extra": part("config", CONFIG) + part("weights", b"x") + part("readme", b"x") + b"--b--\r\n",
    "no name": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
    "no disposition": b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b--\r\n",
    "attachment": b'--b\r\nContent-Disposition: attachment; name="config"\r\n\r\nx\r\n--b--\r\n',
    "cut": part("config", CONFIG) + part("weights", b"x"),
    "cut in a header": b"--b\r\nContent-Dispo",
    "wrong boundary": part("config", CONFIG).replace(b"--b", b"--c"),
    "no multipart": b"just text",
    "many headers": part("config", CONFIG, b"X: y\r\n" * 65),
    "giant header": part("config", CONFIG, b"X: " + b"y" * 100_000 + b"\r\n"),
    "odd name": part("../config", CONFIG) + b"--b--\r\n",
    "many parts": part("config", CONFIG) + part("x", b"") * 30_000 + b"--b--\r\n",
}


@pytest.mark.parametrize("name", BAD_FORMS)
async def test_forms_that_are_wrong(client: Client, registry: FakeRegistry, name: str) -> None:
    answer = await put_raw(client, BAD_FORMS[name])
    openai_error(answer, 400, "bad_upload")
    assert not registry.seen_paths


@pytest.mark.parametrize(
    "name", ["chat_template", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "model.py", "x/y.PY"]
)
async def test_parts_that_would_be_run(client: Client, registry: FakeRegistry, name: str) -> None:
    body = part("config", CONFIG) + part("weights", b"x") + part(name, b"{{ code }}") + b"--b--\r\n"
    openai_error(await put_raw(client, body), 422, "unexpected_file")
    assert not registry.seen_paths


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream", "multipart/mixed; boundary=b", ""])
async def test_only_multipart_is_taken(client: Client, kind: str) -> None:
    openai_error(await put_raw(client, b"x", {"content-type": kind}), 415, "unsupported_media_type")


@pytest.mark.parametrize("boundary", ["", "x" * 71, '"a\x01b"', "é"])
async def test_evil_boundaries(api: FastAPI, boundary: str) -> None:
    kind = f"multipart/form-data; boundary={boundary}"
    async with Call(api, "PUT", "/adapters/new", body=b"x", headers={"content-type": kind}) as call:
        assert b"bad_upload" in await call.whole()
        assert call.status == 400


async def test_the_config_has_its_own_limit(client: Client) -> None:
    body = part("config", b" " * (257 << 10)) + part("weights", b"x") + b"--b--\r\n"
    openai_error(await put_raw(client, body), 422, "bad_config")


async def test_a_declared_size_over_the_limit(api: FastAPI) -> None:
    headers = {**MULTIPART, "content-length": "99999999999999999999999"}
    async with Call(api, "PUT", "/adapters/new", headers=headers) as call:
        assert b"upload_too_large" in await call.whole()
        assert call.status == 413
        assert call.headers["connection"] == "close"


async def test_a_counted_size_over_the_limit_stops_the_reading(api: FastAPI, registry: FakeRegistry) -> None:
    call = Call(api, "PUT", "/adapters/new", headers=MULTIPART)
    call.send(part("config", CONFIG) + part("weights", b"x" * (3 << 20))[:-2])
    call.send(b"x" * (2 << 20))  # and more would come
    async with call:
        assert b"4194304 bytes" in await call.whole()
        assert call.status == 413
    assert not registry.seen_paths


@pytest.mark.parametrize("spelling", ["{}", "sha256:{}"])
async def test_a_digest_that_is_right(client: Client, spelling: str) -> None:
    digest = spelling.format(hashlib.sha256(WEIGHTS).hexdigest())
    assert (await put(client, params={"weights_sha256": digest})).status_code == 201


async def test_a_content_digest_is_of_the_body_and_not_of_the_weights(client: Client) -> None:
    """RFC 9530: whoever sends it means the whole message, which this server does not check."""
    assert (await put(client, headers={"Content-Digest": f"sha-256=:{'A' * 43}=:"})).status_code == 201


async def test_a_digest_that_is_wrong(client: Client, registry: FakeRegistry) -> None:
    wrong, right = "0" * 64, hashlib.sha256(WEIGHTS).hexdigest()
    error = openai_error(await put(client, params={"weights_sha256": wrong}), 422, "digest_mismatch")
    assert f"`weights_sha256` says {wrong}" in error["message"]
    assert f"weights file has the SHA-256 {right}" in error["message"]
    assert not registry.seen_paths


@pytest.mark.parametrize("digest", ["", "xyz", "md5:" + "0" * 32, "0" * 63])
async def test_a_digest_that_is_none(client: Client, digest: str) -> None:
    openai_error(await put(client, params={"weights_sha256": digest}), 400, "bad_upload")


async def test_the_adapters_digest_is_not_taken_for_the_weights(client: Client, registry: FakeRegistry) -> None:
    answer = await put(client, params={"digest": hashlib.sha256(WEIGHTS).hexdigest()})
    assert "`weights_sha256`" in openai_error(answer, 400, "bad_upload")["message"]
    assert not registry.seen_paths


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (AdapterInvalid("no module matches", code="no_modules_matched"), 422, "no_modules_matched"),
        (UnsupportedFormat("a pickle"), 415, "unsupported_format"),
        (StorageFull("no room"), 507, "storage_full"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
async def test_refusals_by_the_store(
    client: Client, registry: FakeRegistry, failure: Any, status: int, code: str
) -> None:
    registry.failure = failure
    openai_error(await put(client), status, code)
    assert ("public", "new") not in registry.names


@pytest.mark.parametrize("name", ["Upper", "a,b", "a:b", "x" * 65, "-a", "%2e%2e", "a%20b", "%00"])
async def test_bad_names(client: Client, name: str) -> None:
    openai_error(await put(client, name), 422, "bad_name")


async def test_an_upload_that_stops_coming(services: Services) -> None:
    settings = replace(services.settings, upload_idle_seconds=0.01)
    api = create_api(replace(services, metrics=Metrics(), settings=settings))
    call = Call(api, "PUT", "/adapters/new", headers=MULTIPART)
    call.send(part("config", CONFIG))
    async with call:
        assert b"upload_incomplete" in await call.whole()
        assert call.status == 408
        assert call.headers["connection"] == "close"


async def test_an_upload_that_drips(services: Services) -> None:
    settings = replace(services.settings, upload_idle_seconds=0.05, min_upload_rate=1 << 30)
    api = create_api(replace(services, metrics=Metrics(), settings=settings))
    call = Call(api, "PUT", "/adapters/new", headers=MULTIPART)
    async with call:
        reading = asyncio.create_task(call.whole())
        while not reading.done():
            call.send(b"")
            call.send(b"\r\n")
            await asyncio.sleep(0)
        assert b"slower than" in reading.result()


async def test_too_many_uploads_at_a_time(services: Services) -> None:
    settings = replace(services.settings, max_upload_bodies=1)
    api = create_api(replace(services, metrics=Metrics(), settings=settings))
    async with Call(api, "PUT", "/adapters/new", headers=MULTIPART) as first:
        await until(lambda: api.state.upload_bodies)
        async with Call(api, "PUT", "/adapters/new", body=b"x", headers=MULTIPART) as second:
            assert b"overloaded" in await second.whole()
            assert second.headers["retry-after"] == "1"
        first.send(b"--b--", more=False)
        assert b"bad_upload" in await first.whole()
    assert api.state.upload_bodies == 0


async def test_slow_bodies_hold_up_nobody(services: Services) -> None:
    settings = replace(services.settings, max_uploads=1)
    api = create_api(replace(services, metrics=Metrics(), settings=settings))
    body = part("config", CONFIG) + part("weights", WEIGHTS) + b"--b--\r\n"
    async with Call(api, "PUT", "/adapters/slow", headers=MULTIPART) as slow:
        slow.send(body[:10])
        await until(lambda: api.state.upload_bodies)
        async with Call(api, "PUT", "/adapters/new", body=body, headers=MULTIPART) as quick:
            await quick.whole()
            assert quick.status == 201
        slow.send(body[10:], more=False)
        await slow.whole()
        assert slow.status == 201


async def test_complete_bodies_wait_for_their_turn(
    services: Services, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, leave, inside, most = registry.add, threading.Event(), [0], [0]

    def slowly(*arguments: Any, **options: Any) -> tuple[AdapterInfo, bool]:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        assert leave.wait(10)
        inside[0] -= 1
        return add(*arguments, **options)

    monkeypatch.setattr(registry, "add", slowly)
    api = create_api(replace(services, metrics=Metrics(), settings=replace(services.settings, max_uploads=1)))
    body = part("config", CONFIG) + part("weights", WEIGHTS) + b"--b--\r\n"
    calls = [Call(api, "PUT", f"/adapters/new{number}", body=body, headers=MULTIPART) for number in range(3)]
    async with calls[0], calls[1], calls[2]:
        await until(lambda: inside[0])
        load = Call(api, "POST", "/v1/load_lora_adapter", body={"lora_name": "x", "lora_path": "x"})
        async with load:
            assert b"overloaded" in await load.whole()
        leave.set()
        await asyncio.gather(*(call.whole() for call in calls))
    assert [call.status for call in calls] == [201] * 3
    assert most == [1]


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [
        (errno.ENOSPC, 507, "storage_full"),
        (errno.EIO, 507, "storage_full"),
        (errno.EMFILE, 503, "store_unavailable"),
        (errno.ETIMEDOUT, 503, "store_unavailable"),
    ],
)
@pytest.mark.parametrize(
    ("owner", "call"),
    [(uploads, "staged_file"), (PartReader, "write"), (PartReader, "close"), (FakeRegistry, "add")],
    ids=["create", "write", "close", "read"],
)
async def test_disks_that_refuse(
    client: Client, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, number: int, status: int, code: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, call, refuse)
    answer = await put(client)
    assert ("full" in openai_error(answer, status, code)["message"]) == (number == errno.ENOSPC)
    assert ("retry-after" in answer.headers) == (status == 503)


async def test_uploads_survive_a_cleaner_of_temporary_folders(client: Client, settings: ApiSettings) -> None:
    shutil.rmtree(settings.staging)
    assert (await put(client)).status_code == 201


async def test_junk_around_the_parts_is_not_stored(client: Client, registry: FakeRegistry) -> None:
    body = part("config", CONFIG) + part("weights", b"x") + b"--b--\r\n" + b"epilogue" * 10
    assert (await put_raw(client, body)).status_code == 201
    assert registry.added[-1].bytes == 1

"""What keeps a bucket from being used: at the start with what to do, later as 503; never with its address."""

from collections.abc import Callable

import pytest
from obstore.store import MemoryStore

from adapters_store.bucket import Bucket
from adapters_store.errors import StoreUnavailable
from adapters_store.log import Log, open_store
from adapters_store.objects import Objects
from adapters_store.places import open_objects, prove
from tests.adapters_store.s3 import S3

DIGEST = "0" * 64


def refusal(action: Callable[[], object]) -> StoreUnavailable:
    with pytest.raises(StoreUnavailable) as caught:
        action()
    assert caught.value.status == 503
    assert caught.value.retry_after == 2.0
    assert "127.0.0.1" not in caught.value.message
    return caught.value


def check_every_request(log: Log, code: str) -> None:
    """A server that was started before is told the same for each request."""
    for request in (
        log.records,
        log.sizes,
        lambda: log.manifest(DIGEST),
        lambda: log.commit("t", "n", 1, "delete"),
        lambda: log.commit("t", "n", 1, "upload", {}, {DIGEST: b"x"}),
    ):
        assert refusal(request).code == code


def test_a_bucket_that_is_missing(s3: S3) -> None:
    error = refusal(lambda: open_store("s3://nowhere/prefix"))
    assert error.code == "store_not_found"
    assert "`s3://nowhere/prefix` has no such bucket: create it, or name another with --store" in error.message
    check_every_request(Log(open_objects("s3://nowhere/prefix")), "store_not_found")


def test_credentials_that_are_refused(s3: S3) -> None:
    url = s3.url()
    log = open_store(url)
    with s3.refusing():
        error = refusal(lambda: open_store(url))
        assert error.code == "store_denied"
        assert "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION" in error.message
        check_every_request(log, "store_denied")
    assert log.records() == []


def test_an_endpoint_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    error = refusal(lambda: open_store("s3://bucket/prefix"))
    assert error.code == "store_unavailable"
    assert "AWS_ENDPOINT_URL" in error.message
    check_every_request(Log(open_objects("s3://bucket/prefix")), "store_unavailable")


def test_an_account_that_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    error = refusal(lambda: open_store("az://container/prefix"))
    assert error.code == "store_denied"
    assert "AZURE_STORAGE_ACCOUNT_NAME" in error.message


def test_a_store_that_overwrites_records_is_refused() -> None:
    class Careless(Bucket):
        def create(self, key: str, data: bytes) -> None:
            self.put(key, data)

    error = refusal(lambda: prove(Objects(Careless(MemoryStore())), "s3://bucket"))
    assert error.code == "store_unsuitable"
    assert "If-None-Match" in error.message

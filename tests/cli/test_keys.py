"""`polyrank keys`: on a file, and on a Redis, without any server."""

import json
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.access.key import KeyTable, utc_now
from server.access.key_file import KeyFile
from server.errors import InvalidKey
from tests.cli.conftest import Polyrank
from tests.support.redis_server import RedisServer, require_redis


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys.json"
    monkeypatch.setenv("POLYRANK_API_KEYS", str(path))
    return path


def test_a_key_is_shown_once_and_works(polyrank: Polyrank, place: Path) -> None:
    made = polyrank("keys", "add", "--tenant", "acme", "--scope", "adapters:write", "--scope", "generate")
    secret = made.out.strip()
    assert re.fullmatch(r"pr_[a-z2-7]{8}_[A-Za-z0-9_-]{43}", secret)
    key = KeyTable(KeyFile(place).read()).find(secret, utc_now())
    assert (key.tenant, sorted(key.scopes), key.expires) == ("acme", ["adapters:write", "generate"], None)
    listed = polyrank("keys", "ls")
    assert key.id in listed.out
    for told in (made.err, listed.out, place.read_text(), polyrank("keys", "ls", "--json").out):
        assert secret[12:] not in told
    assert key.sha256 not in listed.out


def test_the_least_is_granted_unless_asked_for(polyrank: Polyrank, place: Path) -> None:
    told = json.loads(polyrank("keys", "add", "--json").out)
    assert (told["tenant"], told["scopes"], told["state"]) == ("public", ["generate"], "active")
    assert "sha256" not in told
    key = KeyTable(KeyFile(place).read()).find(told["key"], utc_now())
    assert (key.rate_limit, key.token_limit) == (None, None)


def test_every_option_is_kept(polyrank: Polyrank, place: Path) -> None:
    options = ("--rate-limit", "60/minute", "--token-limit", "100000/hour", "--note", "nightly tests")
    polyrank(
        "keys", "add", "--tenant", "acme", "--expires", "90d", *options, "--max-adapters", "5", "--max-bytes", "2GiB"
    )
    ring = KeyFile(place).read()
    key = ring.keys[0]
    assert (key.rate_limit, key.token_limit, key.note) == ("60/minute", "100000/hour", "nightly tests")
    assert key.expires is not None
    assert timedelta(days=89) < key.expires - datetime.now(UTC) <= timedelta(days=90)
    assert ring.quotas["acme"].model_dump() == {"adapters": 5, "bytes": 2 << 30}
    shown = polyrank("keys", "ls").out
    for part in (
        "60/minute, 100000/hour tokens",
        "nightly tests",
        "tenant acme: at most 5 adapters and 2147483648 bytes",
    ):
        assert part in shown
    polyrank("keys", "add", "--expires", "2099-01-31T00:00Z")
    assert KeyFile(place).read().keys[1].expires == datetime(2099, 1, 31, tzinfo=UTC)


def test_a_revoked_key_stays_in_the_list(polyrank: Polyrank, place: Path) -> None:
    secrets = [polyrank("keys", "add").out.strip() for _ in range(2)]
    for _ in range(2):  # again is no error, and keeps the first time
        assert polyrank("keys", "revoke", secrets[0][:11]).code == 0
    ring = KeyFile(place).read()
    with pytest.raises(InvalidKey):
        KeyTable(ring).find(secrets[0], utc_now())
    assert KeyTable(ring).find(secrets[1], utc_now()).id == secrets[1][:11]
    states = {key["id"]: key["state"] for key in json.loads(polyrank("keys", "ls", "--json").out)["keys"]}
    assert states == {secrets[0][:11]: "revoked", secrets[1][:11]: "active"}
    missing = polyrank("keys", "revoke", "pr_aaaaaaaa")
    assert (missing.code, "no_such_key" in missing.err) == (1, True)


def test_quotas_are_set_and_lifted(polyrank: Polyrank, place: Path) -> None:
    polyrank("keys", "add", "--tenant", "acme", "--max-adapters", "5")
    polyrank("keys", "add", "--tenant", "acme")  # says nothing of it
    assert KeyFile(place).read().quotas["acme"].adapters == 5
    polyrank("keys", "quota", "acme", "--max-bytes", "1MiB")
    assert KeyFile(place).read().quotas["acme"].model_dump() == {"adapters": None, "bytes": 1 << 20}
    assert json.loads(polyrank("keys", "quota", "acme", "--json").out) == {
        "tenant": "acme",
        "adapters": None,
        "bytes": None,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "--scope", "root"),
        ("add", "--tenant", "../x"),
        ("add", "--rate-limit", "fast"),
        ("add", "--token-limit", "1/fortnight"),
        ("add", "--expires", "soon"),
        ("add", "--expires", "-1d"),
        ("add", "--max-bytes", "much"),
        ("add", "--max-adapters", "-1"),
        ("add", "--note", "x" * 201),
        ("quota", "a/b"),
        ("add", "--api-keys", "http://host"),
        ("revoke",),
    ],
    ids=" ".join,
)
def test_wrong_arguments_make_nothing(polyrank: Polyrank, place: Path, arguments: tuple[str, ...]) -> None:
    result = polyrank("keys", *arguments)
    assert (result.code, result.out) == (2, "")
    assert not place.exists()


def test_without_a_place_it_says_how_to_name_one(polyrank: Polyrank) -> None:
    result = polyrank("keys", "ls")
    assert result.code == 2
    assert "POLYRANK_API_KEYS" in result.err


def test_a_broken_file_is_left_alone(polyrank: Polyrank, place: Path) -> None:
    place.write_text("{")
    for arguments in (("add",), ("ls",), ("revoke", "pr_aaaaaaaa")):
        result = polyrank("keys", *arguments)
        assert (result.code, "api_keys_invalid" in result.err) == (1, True)
    assert place.read_text() == "{"


def test_keys_in_a_redis(polyrank: Polyrank, tmp_path: Path) -> None:
    require_redis()
    with RedisServer(tmp_path) as redis:
        secret = polyrank("keys", "add", "--api-keys", redis.url, "--tenant", "acme").out.strip()
        assert secret[:11] in polyrank("keys", "ls", "--api-keys", redis.url).out
        assert polyrank("keys", "revoke", secret[:11], "--api-keys", redis.url).code == 0
        assert "revoked" in polyrank("keys", "ls", "--api-keys", redis.url).out
    away = polyrank("keys", "add", "--api-keys", redis.url)
    assert (away.code, "Redis did not do it" in away.err) == (1, True)


def test_keys_made_at_once_are_all_kept(place: Path) -> None:
    """By threads here; by processes in tests/access."""
    from server import cli

    threads = [threading.Thread(target=cli.run, args=(["keys", "add"],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(KeyFile(place).read().keys) == 8

"""What a key is, who is let in with it, and what a broken collection of keys says."""

import json
import random
import re
import statistics
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from server.access.key import SCOPES, Keyring, KeysInvalid, KeyTable, TenantQuota, decode, encode, new_secret, utc_now
from server.errors import InvalidKey
from tests.support.api_keys import YESTERDAY, ApiKeys

NOW = utc_now()


def test_a_key_is_256_random_bits_behind_its_id() -> None:
    made = [new_secret(Keyring()) for _ in range(100)]
    assert len({secret for secret, _ in made}) == len({key_id for _, key_id in made}) == 100
    for secret, key_id in made:
        assert secret.startswith(f"{key_id}_")
        assert len(secret.removeprefix(f"{key_id}_")) == 43  # base64 of 32 bytes


def test_a_key_is_found_by_its_own_text_alone() -> None:
    keys = ApiKeys()
    one, other = keys.make("generate", tenant="acme"), keys.make("metrics", tenant="globex")
    table = KeyTable(keys.ring)
    assert (table.find(one, NOW).tenant, table.find(other, NOW).tenant) == ("acme", "globex")
    assert table.find(one, NOW).scopes == {"generate"}
    crossed = one[:11] + other[11:]
    for wrong in (crossed, one[:-1], one + "x", one.upper(), f" {one}", "", "pr_", keys.ring.keys[0].sha256, "\udcff"):
        with pytest.raises(InvalidKey) as caught:
            table.find(wrong, NOW)
        assert caught.value.key_id is None
        assert not wrong or wrong not in caught.value.message


def test_keys_end_at_their_time_and_when_revoked() -> None:
    keys = ApiKeys()
    soon = datetime.now(UTC) + timedelta(hours=1)
    ending, revoked, lasting = keys.make(expires=soon), keys.make(revoked=YESTERDAY), keys.make()
    table = KeyTable(keys.ring)
    assert table.find(ending, soon - timedelta(seconds=1)).expires == soon
    assert table.active(NOW) == 2
    for secret, when in ((ending, soon), (ending, soon + timedelta(days=9)), (revoked, NOW)):
        with pytest.raises(InvalidKey) as caught:
            table.find(secret, when)
        assert caught.value.key_id == secret[:11]  # for the record of changes
    assert table.find(lasting, soon + timedelta(days=999)).expires is None


def test_keys_are_written_and_read_alike() -> None:
    keys = ApiKeys()
    keys.make("generate", "admin", tenant="acme", rate_limit="60/minute", token_limit="100000/hour", note="ä\n")
    keys.make(expires=YESTERDAY, revoked=NOW)
    ring = keys.ring.with_quota("acme", TenantQuota(adapters=3)).with_quota("globex", TenantQuota(bytes=1 << 40))
    assert decode(encode(ring)) == ring
    quota = KeyTable(ring).quota("acme")
    assert quota is not None
    assert (quota.adapters, quota.bytes) == (3, None)
    assert KeyTable(ring).quota("public") is None
    assert {"generate", "adapters:read", "adapters:write", "admin", "metrics"} == SCOPES


def changed(**facts: Any) -> bytes:
    keys = ApiKeys()
    keys.make("generate")
    told = json.loads(encode(keys.ring))
    told["keys"][0] |= facts
    return json.dumps(told).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"keys": 1}',
        b'{"schema_version": 2}',
        b'{"more": []}',
        b'{"quotas": {"../x": {}}}',
        b'{"quotas": {"a": {"adapters": -1}}}',
        changed(scopes=[]),
        changed(scopes=["root"]),
        changed(tenant="../x"),
        changed(tenant=""),
        changed(sha256="secret-that-nobody-may-read"),
        changed(id="pr_UPPERCAS"),
        changed(rate_limit="fast"),
        changed(token_limit="-1/hour"),
        changed(expires="2027-01-01T00:00:00"),  # of which clock?
        changed(expires="soon"),
        changed(more=1),
        b'{"keys": [' + b"[" * 100_000,
        b" " * (17 << 20),
    ],
    ids=lambda data: re.sub(r"[^a-z]", "", data[-40:].decode("latin-1"))[:30] or "blank",
)
def test_what_is_no_collection_of_keys_is_refused_whole(data: bytes) -> None:
    with pytest.raises(KeysInvalid) as caught:
        decode(data)
    assert "nobody-may-read" not in str(caught.value)


def test_two_keys_of_one_id_are_refused() -> None:
    keys = ApiKeys()
    keys.make()
    told = json.loads(encode(keys.ring))
    told["keys"] *= 2
    with pytest.raises(KeysInvalid, match="one id"):
        decode(json.dumps(told).encode())


@pytest.mark.deep
def test_the_time_of_a_refusal_says_nothing_of_the_key() -> None:
    """Right but for the last letter, against wrong from the first on: in turn, and by a test of ranks."""
    keys = ApiKeys()
    right = keys.make()
    table, chance = KeyTable(keys.ring), random.Random(1)
    near = right[:-1] + ("A" if right[-1] != "A" else "B")
    far = right[:12] + "".join(chance.choice("abcdefgh") for _ in right[12:])
    times: dict[str, list[int]] = {near: [], far: []}
    for _ in range(20_000):
        for secret in chance.sample([near, far], 2):
            started = time.perf_counter_ns()
            with pytest.raises(InvalidKey):
                table.find(secret, NOW)
            times[secret].append(time.perf_counter_ns() - started)
    ranked = sorted((each, secret) for secret, found in times.items() for each in found)
    ranks = [place for place, (_, secret) in enumerate(ranked) if secret == near]
    size = len(ranks)
    deviation = (size * size * (2 * size + 1) / 12) ** 0.5  # of the sum of ranks, Mann and Whitney
    z = (sum(ranks) - size * (2 * size - 1) / 2) / deviation
    assert abs(z) < 2.58, (z, statistics.median(times[near]), statistics.median(times[far]))

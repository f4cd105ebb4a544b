"""What a tenant sees and may change: its own adapters, and behind them the public ones; nothing of anybody else's."""

from pathlib import Path

import pytest

from adapters_store.errors import AdapterNotFound, CodedError
from adapters_store.lookup import PublicAdapter
from adapters_store.registry import AdapterRegistry
from tests.adapters_store.support import Upload

PUBLIC, ACME, GLOBEX = "public", "acme", "globex"


def message(registry: AdapterRegistry, reference: str, tenant: str) -> str:
    with pytest.raises(AdapterNotFound) as caught:
        registry.resolve(reference, tenant)
    return caught.value.message


def test_a_tenants_own_adapter_goes_before_the_public_one(registry: AdapterRegistry, upload: Upload) -> None:
    """Exchanged, the answers would be exchanged."""
    public, _ = upload("legal", 1)
    acme, _ = upload("legal", 2, tenant=ACME)
    globex, _ = upload("legal", 3, tenant=GLOBEX)
    for tenant, own in ((PUBLIC, public), (ACME, acme), (GLOBEX, globex), ("nobody", public)):
        ref = registry.resolve("legal", tenant)
        owner = tenant if own is not public else PUBLIC
        assert (ref.digest, ref.tenant) == (own.digest, owner)
        assert registry.info("legal@1", tenant) == own
        assert own.tenant == owner
        assert registry.list(tenant) == ([own], None)
        assert registry.versions("legal", tenant) == [own]
    assert registry.current("legal", "nobody") is None
    assert registry.current("legal", ACME) == acme


def test_a_version_is_of_the_name_that_is_meant(registry: AdapterRegistry, upload: Upload) -> None:
    for seed in (1, 2, 3):
        upload("legal", seed, replace=True)
    upload("legal", 4, tenant=ACME)
    assert registry.resolve("legal@3", GLOBEX).version == 3
    assert message(registry, "legal@3", ACME).startswith("The model `legal@3` does not exist")


def test_digests_of_others_lead_nowhere(registry: AdapterRegistry, upload: Upload) -> None:
    public, _ = upload("one", 1)
    acme, _ = upload("two", 2, tenant=ACME)
    assert registry.resolve(f"sha256:{public.digest}", ACME).tenant == PUBLIC
    assert registry.resolve(f"sha256:{acme.digest}", ACME).tenant == ACME
    for tenant in (PUBLIC, GLOBEX):
        nobodys = message(registry, "sha256:" + "0" * 64, tenant).replace("0" * 64, acme.digest)
        assert message(registry, f"sha256:{acme.digest}", tenant) == nobodys
    upload("three", 2, tenant=GLOBEX)  # the same content is now its own, too
    assert registry.resolve(f"sha256:{acme.digest}", GLOBEX).name == "three"
    registry.delete("two", ACME)
    assert registry.resolve(f"sha256:{acme.digest}", GLOBEX).name == "three"


def test_hints_name_nothing_of_others(registry: AdapterRegistry, upload: Upload) -> None:
    whose = {"legal-v1": PUBLIC, "legal-v2": ACME, "legal-v3": GLOBEX}
    for seed, (name, owner) in enumerate(whose.items()):
        upload(name, seed, tenant=owner)
    for tenant in (PUBLIC, ACME, GLOBEX):
        hint = message(registry, "legal-v", tenant)
        seen = [name for name, owner in whose.items() if owner in (PUBLIC, tenant)]
        assert [name for name in whose if name in hint] == seen
    registry.delete("legal-v2", ACME)
    assert "rollback" in message(registry, "legal-v2", ACME)
    for tenant in (PUBLIC, GLOBEX):
        assert message(registry, "legal-v2", tenant) == message(registry, "legal-v9", tenant).replace("v9", "v2")


def test_pages_hold_each_name_once_and_nobody_elses(registry: AdapterRegistry, upload: Upload) -> None:
    for number, name in enumerate(("a", "c", "e", "g")):
        upload(name, number)
    for number, name in enumerate(("b", "c", "f")):
        upload(name, 10 + number, tenant=ACME)
    upload("d", 20, tenant=GLOBEX)
    for limit in (1, 2, 3, 6, 7):
        found: list[tuple[str, str]] = []
        cursor: str | None = None
        while True:
            page, cursor = registry.list(ACME, cursor, limit)
            assert len(page) == limit or cursor is None
            found += [(info.name, info.tenant) for info in page]
            if cursor is None:
                break
        own = dict.fromkeys("bcf", ACME)
        assert found == [(name, own.get(name, PUBLIC)) for name in "abcefg"]
    registry.delete("c", ACME)
    assert {(info.name, info.tenant) for info in registry.list(ACME)[0]} >= {("c", PUBLIC)}


def test_public_adapters_are_changed_by_the_public_tenant_alone(registry: AdapterRegistry, upload: Upload) -> None:
    first, _ = upload("legal", 1)
    upload("legal", 2, replace=True)
    for change in (
        lambda: registry.delete("legal", ACME),
        lambda: registry.rollback("legal", 1, ACME),
    ):
        with pytest.raises(PublicAdapter) as caught:
            change()
        assert (caught.value.status, caught.value.code) == (403, "public_adapter")
    assert registry.resolve("legal", ACME).version == 2
    own, created = upload("legal", 1, tenant=ACME)  # no conflict, whatever the public name holds
    assert (created, own.version, own.digest) == (True, 1, first.digest)
    registry.delete("legal", ACME)
    assert registry.resolve("legal", ACME).tenant == PUBLIC
    assert registry.versions("legal", ACME)[0].kind == "deleted"  # its own history, to go back to
    assert registry.rollback("legal", 1, ACME).tenant == ACME
    assert registry.resolve("legal").version == 2


def test_others_adapters_cannot_be_changed_and_look_absent(registry: AdapterRegistry, upload: Upload) -> None:
    upload("secret", 1, tenant=ACME)
    upload("secret", 2, tenant=ACME, replace=True)
    for tenant in (GLOBEX, PUBLIC):
        for call in (
            lambda name, tenant=tenant: registry.delete(name, tenant),
            lambda name, tenant=tenant: registry.rollback(name, 1, tenant),
            lambda name, tenant=tenant: registry.versions(name, tenant),
            lambda name, tenant=tenant: registry.open_file(name, "adapter_config.json", tenant),
        ):
            said = []
            for name in ("secret", "absent"):
                with pytest.raises(CodedError) as caught:
                    call(name)
                said.append((caught.value.status, caught.value.code, caught.value.message.replace(name, "?")))
            assert said[0] == said[1]
    assert registry.resolve("secret", ACME).version == 2


def test_tenants_outlast_a_restart(registry: AdapterRegistry, upload: Upload, tmp_path: Path) -> None:
    public, _ = upload("legal", 1)
    acme, _ = upload("legal", 2, tenant=ACME)
    again = AdapterRegistry(registry._log, registry.base)
    assert again.info("legal", ACME) == acme
    assert again.info("legal", GLOBEX) == public

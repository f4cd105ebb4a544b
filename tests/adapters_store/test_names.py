"""Names and references."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.errors import AdapterInvalid, AdapterNotFound
from adapters_store.names import Reference, check_name, check_tenant, not_found, parse

BASE = "Org/Base-1B"
DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["a", "0", "legal-v2", "a.b_c-d", "x" * 64])
def test_good_names(name: str) -> None:
    check_name(name, BASE)
    assert parse(name, BASE) == Reference(name=name)


BAD_NAMES = [
    *["", ".", "..", "../x", "-a", "_a", ".a", "A", "Legal", "a b", "a,b", "a:b", "a/b", "a\\b", "a@1", "a\n", "\na"],
    *["a\x00", "ä", "a\u200b", "x" * 65, "base", "__base__", "tgi", "dummy", "sha256:" + DIGEST, "a%2e", "names/../a"],
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        check_name(name, BASE)
    assert (caught.value.status, caught.value.code, caught.value.param) == (422, "bad_name", "name")
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(("name", "base"), [("tiny", "tiny"), ("tiny", "Tiny")])
def test_the_base_keeps_its_names(name: str, base: str) -> None:
    for names in ((base,), ("other", base)):
        with pytest.raises(AdapterInvalid, match="base model"):
            check_name(name, *names)
    assert parse(f"{base}:a", "other", base) == Reference(name="a")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("a@3", Reference(name="a", version=3)),
        ("base:a", Reference(name="a")),
        ("base:a@12", Reference(name="a", version=12)),
        (f"{BASE}:a", Reference(name="a")),
        (f"sha256:{DIGEST}", Reference(digest=DIGEST)),
    ],
)
def test_references(reference: str, expected: Reference) -> None:
    assert parse(reference, BASE) == expected


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "@",
        "a@",
        "a@0",
        "a@01",
        "a@-1",
        "a@1.0",
        "a@²",
        "a@99999999999",
        "other:a",
        ":a",
        "base:",
        "base:base:a",
        "sha256:",
        "sha256:" + DIGEST[:-1],
        "sha256:" + DIGEST.upper(),
        "sha256:" + DIGEST + "@1",
        "../a",
    ],
)
def test_what_can_name_nothing_is_not_found(reference: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        parse(reference, BASE)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@given(st.text())
def test_any_text_is_parsed_or_not_found(reference: str) -> None:
    try:
        found = parse(reference, BASE)
    except AdapterNotFound as error:
        assert error.message.isprintable()  # noqa: PT017
    else:
        assert (found.name is None) != (found.digest is None)


def test_the_message_is_vllms_with_near_names() -> None:
    assert not_found("x").message == "The model `x` does not exist."
    assert not_found("x", ["y", "z"]).message == "The model `x` does not exist. Did you mean `y`, `z`?"
    assert len(not_found("x" * 10_000).message) < 200


@pytest.mark.parametrize("tenant", ["", "..", "a/b", "-a", "a" * 65, "a.b", "a\n"])
def test_a_tenant_is_one_path_segment(tenant: str) -> None:
    check_tenant("acme-1")
    with pytest.raises(ValueError, match="path segment"):
        check_tenant(tenant)

"""One spelling of JSON; digests; foreign text in messages."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import canonical

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=8
)


@given(_json)
def test_key_order_does_not_matter(value: object) -> None:
    data = canonical.dump({"a": value, "b": 1})
    assert data == canonical.dump({"b": 1, "a": value})
    assert data.isascii()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical.dump({"a": value})


@pytest.mark.parametrize("size", [0, 1, canonical.CHUNK - 1, canonical.CHUNK, canonical.CHUNK + 1])
def test_file_and_bytes_have_one_digest(tmp_path: Path, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert canonical.digest_file(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()
    assert canonical.digest(data[:size]) == canonical.digest_file(tmp_path / "file")


def test_foreign_text_is_escaped_and_cut() -> None:
    assert canonical.shorten("a\n\x00b") == r"a\n\x00b"
    assert canonical.shorten("x" * 200, 10) == "x" * 10 + "..."
    assert canonical.shorten("\ud800") == r"\ud800"

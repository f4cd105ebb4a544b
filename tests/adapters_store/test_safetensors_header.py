"""The header check: accepts what PEFT writes, refuses the rest with the code of the threat table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from adapters_store.errors import AdapterInvalid, CodedError, UnsupportedFormat
from adapters_store.limits import HeaderLimits
from adapters_store.safetensors_header import TensorEntry, read_header
from tests.adapters_store.support import craft, entry
from tests.adapters_store.test_magic import WRONG_FILES

SMALL = HeaderLimits(header_bytes=4096, tensors=20)


def check(tmp_path: Path, data: bytes, limits: HeaderLimits = SMALL) -> dict[str, TensorEntry]:
    path = tmp_path / "weights"
    path.write_bytes(data)
    return read_header(path, limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    data = save({"b": torch.randn(3, 5).to(dtype), "a": torch.randn(7).to(dtype)}, metadata={"format": "pt"})
    found = check(tmp_path, data)
    assert {name: (item.dtype, item.shape) for name, item in found.items()} == {
        "a": (dtype, (7,)),
        "b": (dtype, (3, 5)),
    }
    for item in found.values():
        raw = torch.frombuffer(bytearray(data[item.start : item.end]), dtype=dtype)
        with safe_open(tmp_path / "weights", framework="pt") as library:
            assert torch.equal(raw.view(item.shape), library.get_tensor(item.name))


@pytest.mark.parametrize(("data", "what"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_other_formats_are_415_and_named(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(UnsupportedFormat, match=what) as caught:
        check(tmp_path, data)
    assert (caught.value.status, caught.value.code) == (415, "unsupported_format")


ONE = entry([2, 2])
BAD: dict[str, tuple[str, bytes]] = {
    "duplicate name": (
        "bad_tensor_entry",
        craft(b'{"a":%s,"a":%s}' % (json.dumps(ONE).encode(), json.dumps(ONE).encode()), bytes(16)),
    ),
    "duplicate field": ("bad_tensor_entry", craft(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1]}}', bytes(4))),
    "control character": ("bad_tensor_entry", craft({"a\x00b": ONE}, bytes(16))),
    "newline": ("bad_tensor_entry", craft({"a\nb": ONE}, bytes(16))),
    "delete character": ("bad_tensor_entry", craft({"a\x7fb": ONE}, bytes(16))),
    "right-to-left mark": ("bad_tensor_entry", craft({"a\u202eb": ONE}, bytes(16))),
    "lone surrogate": ("bad_tensor_entry", craft(rb'{"\ud800":%s}' % json.dumps(ONE).encode(), bytes(16))),
    "path": ("bad_tensor_entry", craft({"../../etc/passwd": ONE}, bytes(16))),
    "long name": ("bad_tensor_entry", craft({"a" * 1025: ONE}, bytes(16))),
    "dimension 0": ("bad_tensor_entry", craft({"a": entry([0, 4])})),
    "dimension 2^40 beside 0": ("bad_tensor_entry", craft({"a": entry([0, 1 << 40])})),
    "dimension over 2^31": ("bad_tensor_entry", craft({"a": entry([(1 << 31) + 1])})),
    "scalar": ("bad_tensor_entry", craft({"a": entry([])}, bytes(4))),
    "three dimensions": ("bad_tensor_entry", craft({"a": entry([1, 2, 2])}, bytes(16))),
    "header too long": ("header_limits", craft(b"{}".ljust(5000), bytes(16))),
    "too many tensors": ("header_limits", craft({str(n): entry([1], 4 * n) for n in range(21)}, bytes(84))),
    "header longer than file": ("corrupt_safetensors", b"\xff\x00\x00\x00\x00\x00\x00\x00{}"),
    "header of 2^63": ("corrupt_safetensors", b"\x00\x00\x00\x00\x00\x00\x00\x80{}"),
    "five bytes": ("corrupt_safetensors", b"\x02\x00\x00\x00\x00"),
    "no json": ("corrupt_safetensors", craft(b"{hello}", bytes(16))),
    "not utf-8": ("corrupt_safetensors", craft(b'{"\xff\xfe":1}', bytes(16))),
    "list": ("corrupt_safetensors", craft(b" [1, 2, 3]", bytes(16))),
    "infinity": ("corrupt_safetensors", craft(b'{"a":Infinity}', bytes(16))),
    "deep nesting": ("corrupt_safetensors", craft(b'{"a":' + b"[" * 2000, bytes(16))),
    "huge integer": ("corrupt_safetensors", craft(b'{"a":' + b"9" * 4000 + b"}")),
    "metadata of numbers": ("corrupt_safetensors", craft({"__metadata__": {"a": 1}, "a": ONE}, bytes(16))),
    "metadata list": ("corrupt_safetensors", craft({"__metadata__": [], "a": ONE}, bytes(16))),
    "entry is a number": ("corrupt_safetensors", craft({"a": 1})),
    "entry lacks shape": ("corrupt_safetensors", craft({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4))),
    "entry has more": ("corrupt_safetensors", craft({"a": {**ONE, "x": 1}}, bytes(16))),
    "negative dimension": ("corrupt_safetensors", craft({"a": {**ONE, "shape": [-2, -2]}}, bytes(16))),
    "boolean dimension": ("corrupt_safetensors", craft({"a": {**ONE, "shape": [True, 4]}}, bytes(16))),
    "float dimension": ("corrupt_safetensors", craft({"a": {**ONE, "shape": [2.0, 2]}}, bytes(16))),
    "one offset": ("corrupt_safetensors", craft({"a": {**ONE, "data_offsets": [16]}}, bytes(16))),
    "reversed offsets": ("corrupt_safetensors", craft({"a": {**ONE, "data_offsets": [16, 0]}}, bytes(16))),
    "size against shape": ("corrupt_safetensors", craft({"a": {**ONE, "data_offsets": [0, 12]}}, bytes(12))),
    "truncated": ("corrupt_safetensors", craft({"a": ONE}, bytes(15))),
    "trailing bytes": ("corrupt_safetensors", craft({"a": ONE}, bytes(17))),
    "hole": ("corrupt_safetensors", craft({"a": ONE, "b": entry([2, 2], 20)}, bytes(36))),
    "overlap": ("corrupt_safetensors", craft({"a": ONE, "b": entry([2, 2], 8)}, bytes(24))),
    "same range twice": ("corrupt_safetensors", craft({"a": ONE, "b": ONE}, bytes(16))),
    **{
        f"dtype {name}": ("bad_dtype", craft({"a": entry([2], 0, name, size)}, bytes(2 * size)))
        for name, size in (("F64", 8), ("I32", 4), ("I8", 1), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("X", 4))
    },
    "dtype not a string": ("bad_dtype", craft({"a": {**ONE, "dtype": 4}}, bytes(16))),
}


@pytest.mark.parametrize(("code", "data"), BAD.values(), ids=BAD)
def test_refused_with_its_code(tmp_path: Path, code: str, data: bytes) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        check(tmp_path, data)
    assert (caught.value.status, caught.value.code) == (422, code)
    assert caught.value.message.isprintable()


def test_the_tensor_at_fault_is_named_and_escaped(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"evil\\x00name"):
        check(tmp_path, craft({"evil\x00name": ONE}, bytes(16)))


def test_limits_are_exact(tmp_path: Path) -> None:
    twenty = {str(n): entry([1], 4 * n) for n in range(20)}
    assert len(check(tmp_path, craft(twenty, bytes(80)))) == 20
    header = json.dumps({"a": ONE}).encode().ljust(4096)
    assert check(tmp_path, craft(header, bytes(16)))
    with pytest.raises(AdapterInvalid, match="limit is 4096"):
        check(tmp_path, craft(header + b" ", bytes(16)))


def test_a_header_far_heavier_than_its_data_is_refused(tmp_path: Path) -> None:
    data = craft(json.dumps({"a": ONE}).encode().ljust((1 << 20) + 1), bytes(16))
    with pytest.raises(AdapterInvalid) as caught:
        check(tmp_path, data, HeaderLimits())
    assert caught.value.code == "header_limits"


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 200), flip=st.integers(0, 200), value=st.integers(0, 255))
def test_what_we_pass_the_library_passes(tmp_path_factory: Any, cut: int, flip: int, value: int) -> None:
    """Mutated files: never another exception, and never accepted where the library refuses."""
    data = bytearray(save({"a": torch.ones(2, 3), "b": torch.ones(4)}))
    data[flip % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(data[: len(data) - cut % 3])
    try:
        ours = read_header(path, SMALL)
    except CodedError:
        return
    try:
        with safe_open(path, framework="pt") as library:
            assert set(library.keys()) == set(ours)
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(f"ours is laxer: {error}")

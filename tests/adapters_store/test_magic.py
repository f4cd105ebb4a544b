"""What a wrong file is told to be."""

import gzip
import io
import pickle
import tarfile
import zipfile

import pytest
import torch

from adapters_store.magic import SNIFF_BYTES, sniff
from tests.adapters_store.support import craft, entry


def torch_file(*, new_format: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a"), io.BytesIO())
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", "b")
    return buffer.getvalue()


WRONG_FILES = {
    "torch zip": (torch_file(new_format=True), "zip archive or a torch checkpoint"),
    "torch pickle": (torch_file(new_format=False), "pickle"),
    **{f"pickle {n}": (pickle.dumps({"a": 1}, protocol=n), "pickle") for n in range(2, 6)},
    "zip": (zipped(), "zip"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "tar": (archive(), "tar"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64, "LFS"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML"),
    "html after spaces": (b"\n \t<HTML lang='en'>", "HTML"),
    "xml": (b"<?xml version='1.0'?><Error/>", "XML"),
    "json": (b'{"error": "not found"}', "JSON"),
    "json list": (b'["a", "b", "c"]', "JSON"),
    "bzip2": (b"BZh91AY&SY", "bzip2"),
    "xz": (b"\xfd7zXZ\x00\x00", "xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00\x00", "zstandard"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "7z"),
    "numpy": (b"\x93NUMPY\x01\x00", "NumPy"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize(("data", "what"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_file_is_named_with_a_way_out(data: bytes, what: str) -> None:
    found = sniff(data[:SNIFF_BYTES])
    assert found is not None
    assert what in found[0]
    assert len(found[1].split()) > 3


@pytest.mark.parametrize("length", [0x280, 0x580, 0x8B1F, 0x4B50])
def test_a_header_length_that_looks_like_a_magic_is_no_pickle(length: int) -> None:
    header = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = craft(header.ljust(length), bytes(4))
    assert sniff(data[:SNIFF_BYTES]) is None


def test_safetensors_and_noise_pass() -> None:
    assert sniff(craft({"t": entry([1])}, bytes(4))[:SNIFF_BYTES]) is None
    assert sniff(bytes(range(40, 90))) is None

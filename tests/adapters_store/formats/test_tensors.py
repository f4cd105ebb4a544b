"""Reading and scanning tensors by offset."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

from adapters_store.formats import tensors
from adapters_store.limits import HeaderLimits
from adapters_store.safetensors_header import TensorEntry, read_header


def stored(tmp_path: Path, value: torch.Tensor) -> tuple[Path, TensorEntry]:
    path = tmp_path / "weights"
    path.write_bytes(save({"before": torch.randn(3), "t": value}))
    return path, read_header(path, HeaderLimits())["t"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_read_whole_and_in_blocks(
    tmp_path: Path, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    path, entry = stored(tmp_path, value)
    monkeypatch.setattr(tensors, "BLOCK", block)
    with path.open("rb") as file:
        assert torch.equal(tensors.read(file, entry), value)
        pieces = list(tensors.blocks(file, entry))
        found = tensors.scan(file, entry, None)
    assert torch.equal(torch.cat(pieces).view(5, 6), value)
    assert max(len(piece) for piece in pieces) <= block
    assert found.norm == pytest.approx(float(value.double().norm()))


def test_the_tensor_outlives_the_file(tmp_path: Path) -> None:
    value = torch.randn(64, 64)
    path, entry = stored(tmp_path, value)
    with path.open("rb") as file:
        copy = tensors.read(file, entry)
    path.write_bytes(b"")
    assert torch.equal(copy, value)


def test_scan_counts_what_is_not_finite(tmp_path: Path) -> None:
    value = torch.tensor([3.0, math.nan, 4.0, math.inf, -math.inf])
    path, entry = stored(tmp_path, value)
    with path.open("rb") as file:
        found = tensors.scan(file, entry, None)
    assert (found.norm, found.nonfinite, found.overflow) == (5.0, 3, 0)


@pytest.mark.parametrize(("cast", "overflow"), [(None, 0), (torch.float16, 2), (torch.bfloat16, 0), (torch.float32, 0)])
def test_scan_counts_what_the_serving_type_cannot_hold(tmp_path: Path, cast: torch.dtype | None, overflow: int) -> None:
    path, entry = stored(tmp_path, torch.tensor([65504.0, 65536.0, -1e30, 1.0, math.inf]))
    with path.open("rb") as file:
        found = tensors.scan(file, entry, cast)
    assert (found.nonfinite, found.overflow) == (1, overflow)


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    path, entry = stored(tmp_path, torch.randn(1000))
    path.write_bytes(path.read_bytes()[:-100])
    with path.open("rb") as file, pytest.raises(EOFError):
        tensors.read(file, entry)


def test_the_library_agrees(tmp_path: Path) -> None:
    path, entry = stored(tmp_path, torch.randn(4, 9))
    with path.open("rb") as file:
        assert torch.equal(tensors.read(file, entry), load(path.read_bytes())["t"])


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    made = {
        "half": torch.randn(3, 5, generator=generator).half(),
        "across": torch.randn(4, 3, generator=generator).T,
        "row": torch.randn(7, generator=generator),
        "brain": torch.randn(2, 9, generator=generator).bfloat16(),
    }
    tensors.write(tmp_path / "one", made)
    tensors.write(tmp_path / "two", dict(reversed(made.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = load_file(tmp_path / "one")
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in made.items())
    entries = read_header(tmp_path / "one", HeaderLimits())
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())

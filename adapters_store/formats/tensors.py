"""Reads and writes tensors of a safetensors file one by one, whole or in blocks, so that memory stays bounded."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from adapters_store.safetensors_header import DTYPES, TensorEntry

BLOCK = 1 << 20  # elements per block of a scan


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over a tensor found. norm: Frobenius; overflow: finite values that `cast` cannot hold."""

    norm: float
    nonfinite: int
    overflow: int


def read(file: BufferedReader, entry: TensorEntry) -> torch.Tensor:
    """The tensor in its own dtype and shape, in memory of its own."""
    return _fill(file, entry.start, entry.count, entry.dtype).view(entry.shape)


def blocks(file: BufferedReader, entry: TensorEntry) -> Iterator[torch.Tensor]:
    """The tensor's elements in order, flat, at most `BLOCK` at a time."""
    for first in range(0, entry.count, BLOCK):
        count = min(BLOCK, entry.count - first)
        yield _fill(file, entry.start + first * entry.dtype.itemsize, count, entry.dtype)


def scan(file: BufferedReader, entry: TensorEntry, cast: torch.dtype | None) -> Scan:
    """Sums and counts over the tensor, in blocks. Non-finite values do not enter the norm."""
    total, nonfinite, overflow = 0.0, 0, 0
    for block in blocks(file, entry):
        norm = float(torch.linalg.vector_norm(block, dtype=torch.float64))
        if not math.isfinite(norm):
            finite = block[block.isfinite()]
            nonfinite += len(block) - len(finite)
            norm = float(torch.linalg.vector_norm(finite, dtype=torch.float64))
        if cast is not None and cast != block.dtype:
            overflow += int((block.to(cast).isinf() & block.isfinite()).sum())
        total += norm**2
    return Scan(math.sqrt(total), nonfinite, overflow)


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of these tensors, of types in `DTYPES`; equal tensors give equal bytes. Raises OSError.

    A tensor at a time goes to the file, with no lock of the interpreter held: one bytes object of the whole file, as
    the library makes, takes its size twice and holds up every other thread while it is copied.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    types = {dtype: name for name, dtype in DTYPES.items()}
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        fields[name] = {"dtype": types[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    header = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)


def _fill(file: BufferedReader, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(count, dtype=dtype)
    view = memoryview(out.view(torch.uint8).numpy().data)
    file.seek(start)
    while view:
        read = file.readinto(view)
        if not read:
            raise EOFError("the file ends inside a tensor")
        view = view[read:]
    return out

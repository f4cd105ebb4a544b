"""Reads a safetensors header under strict limits, before any library sees the file.

The library takes duplicate keys, `../x` as a name, dimensions of 2**40 and headers of 100 MB; all are refused here.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid, UnsupportedFormat
from adapters_store.limits import HeaderLimits
from adapters_store.magic import SNIFF_BYTES, sniff

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDICES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_AXES = range(1, 3)  # of a plain LoRA's tensors
MAX_DIMENSION = 1 << 31
MAX_NAME = 1024
_SILLY = 1 << 20  # above this a header that outweighs its own data is refused
_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: bytes `start` to `end`, counted from the file's first byte."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        return prod(self.shape)


class _DuplicateKeyError(ValueError):
    pass


def read_header(
    path: Path, limits: HeaderLimits, dtypes: Mapping[str, torch.dtype] = DTYPES, axes: range = _AXES
) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, checked; the data is not read. dtypes: those accepted, by name; axes:
    how many a tensor may have.

    Raises UnsupportedFormat for another format, AdapterInvalid with `header_limits`, `bad_tensor_entry`,
    `bad_dtype` or `corrupt_safetensors`.
    """
    size, raw = path.stat().st_size, raw_header(path, limits)
    length = len(raw)
    if (claimed := raw.count(b'"data_offsets"')) > limits.tensors:
        _limit(f"The header lists {claimed} tensors; the limit is {limits.tensors}.")
    fields = _parse(raw)
    fields.pop("__metadata__", None)
    entries = {name: _entry(name, value, 8 + length, size, dtypes, axes) for name, value in fields.items()}
    _check_cover(entries, 8 + length, size)
    return entries


def raw_header(path: Path, limits: HeaderLimits) -> bytes:
    """The header's own bytes, of a bounded length. Raises as `read_header`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(SNIFF_BYTES)
        _check_format(start)
        length = int.from_bytes(start[:8], "little")
        _check_length(len(start), length, size, limits)
        file.seek(8)
        return file.read(length)


def _check_format(start: bytes) -> None:
    if found := sniff(start):
        what, advice = found
        raise UnsupportedFormat(
            f"`weights` is {what}, not safetensors. Only safetensors is accepted: {advice}.", param="weights"
        )


def _check_length(read: int, length: int, size: int, limits: HeaderLimits) -> None:
    if read < 10 or length > size - 8:
        _corrupt(f"it is {size} bytes long, too short for the header it announces")
    if length > limits.header_bytes:
        _limit(f"The header is {length} bytes long; the limit is {limits.header_bytes}.")
    if length > _SILLY and length > size - 8 - length:
        _limit(f"The header ({length} bytes) is larger than the tensors it describes.")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _DuplicateKeyError as error:
        raise _entry_error(str(error), "occurs twice in the header") from None
    except (ValueError, RecursionError):
        _corrupt("its header is not a JSON object")
    if not isinstance(fields, dict):
        _corrupt("its header is not a JSON object")
    metadata = fields.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _corrupt("its metadata is not a map of strings")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _DuplicateKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return made


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError


def _entry(
    name: str, value: object, base: int, size: int, dtypes: Mapping[str, torch.dtype], axes: range
) -> TensorEntry:
    if not name.isprintable() or ".." in name or len(name) > MAX_NAME:
        raise _entry_error(name, f"is not a tensor name: no control characters, no `..`, at most {MAX_NAME} long")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _corrupt(f"the entry of `{shorten(name)}` needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise AdapterInvalid(
            f"Tensor `{shorten(name)}` has dtype {shorten(str(dtype), 20)}; accepted are {', '.join(dtypes)}.",
            code="bad_dtype",
            param="weights",
        )
    if not _integers(shape) or not _integers(offsets) or len(offsets) != 2:
        _corrupt(f"shape or data_offsets of `{shorten(name)}` are not lists of non-negative integers")
    if len(shape) not in axes or not all(1 <= dimension <= MAX_DIMENSION for dimension in shape):
        some = f"{axes[0]} to {axes[-1]} dimensions"
        raise _entry_error(name, f"has shape {str(shape)[:60]}; {some} of 1 to 2**31 are accepted")
    entry = TensorEntry(name, dtypes[dtype], tuple(shape), base + offsets[0], base + offsets[1])
    if entry.end - entry.start != entry.count * entry.dtype.itemsize or entry.end > size:
        _corrupt(f"the bytes of `{shorten(name)}` do not fit its shape or lie outside the file")
    return entry


def _integers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(entries: dict[str, TensorEntry], base: int, size: int) -> None:
    """Tensors must fill the file without hole or overlap: nothing else may hide in it."""
    position = base
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        if entry.start != position:
            _corrupt(f"there is a hole or an overlap before `{shorten(entry.name)}`")
        position = entry.end
    if position != size:
        _corrupt(f"{size - position} bytes follow the last tensor")


def _entry_error(name: str, problem: str) -> AdapterInvalid:
    return AdapterInvalid(f"Tensor `{shorten(name)}` {problem}.", code="bad_tensor_entry", param="weights")


def _limit(message: str) -> NoReturn:
    raise AdapterInvalid(
        f"{message} Save only the adapter's tensors, or raise the limit.", code="header_limits", param="weights"
    )


def _corrupt(problem: str) -> NoReturn:
    raise AdapterInvalid(f"{_FILE} is damaged: {problem}.", code="corrupt_safetensors", param="weights")

"""A safetensors file of tensors and one JSON object: how generators and recipes are kept. Files may be anybody's."""

import json
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save

from adapters_store import canonical
from adapters_store.errors import AdapterInvalid, UnsupportedFormat
from adapters_store.formats.tensors import read as read_tensor
from adapters_store.limits import HeaderLimits
from adapters_store.safetensors_header import TensorEntry, raw_header, read_header

_KEY = "polyrank"
_FLOAT32 = {"F32": torch.float32}
_AXES = range(1, 4)  # of a bias, a matrix, a convolution


def dump(told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The file. tensors: float32; equal ones give equal bytes. Raises ValueError for NaN in `told`."""
    made = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    data: bytes = save(made, metadata={_KEY: canonical.dump(told).decode()})
    return data


class Container:
    """An open file whose header is sound; its tensors are read one by one, and only those that are asked for.

    what: names the file in messages. Raises AdapterInvalid `generator_invalid`, OSError.
    """

    def __init__(self, path: Path, stream: BufferedReader, limits: HeaderLimits, what: str) -> None:
        self._stream, self._what = stream, what
        try:
            self._entries: dict[str, TensorEntry] = read_header(path, limits, _FLOAT32, _AXES)
        except (AdapterInvalid, UnsupportedFormat) as error:
            self.refuse(f"its safetensors header is refused ({error.code})")
        try:
            self.told: Any = json.loads(json.loads(raw_header(path, limits))["__metadata__"][_KEY])
        except (ValueError, KeyError, RecursionError):
            self.refuse("its header does not say what it holds")

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses a file that has not exactly these tensors; before any is read."""
        if lacking := sorted(shapes.keys() - self._entries.keys()):
            self.refuse(f"it lacks `{lacking[0]}`")
        if extra := sorted(self._entries.keys() - shapes.keys()):
            self.refuse(f"nothing in it mentions `{canonical.shorten(extra[0])}`")
        for name, shape in shapes.items():
            if self._entries[name].shape != shape:
                self.refuse(f"`{name}` is {list(self._entries[name].shape)} and must be {list(shape)}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Refuses a file without this tensor."""
        if name not in self._entries:
            self.refuse(f"it lacks `{name}`")
        return self._entries[name].shape

    def read(self, name: str) -> torch.Tensor:
        """Refuses numbers that are not finite."""
        tensor = read_tensor(self._stream, self._entries[name])
        if not bool(tensor.isfinite().all()):
            self.refuse(f"`{name}` has numbers that are not finite")
        return tensor

    def refuse(self, why: str) -> NoReturn:
        raise AdapterInvalid(f"{self._what} cannot be used: {why}.", code="generator_invalid") from None

"""The work of a merge, in a process of its own: files of factors in, a file of forms out."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapters_store.formats import tensors
from adapters_store.formats.forms_file import FORMS_FILE, facts
from adapters_store.forms import Form, LowRank, ModuleSpec
from adapters_store.merging.lego import Clusters
from adapters_store.merging.methods import Progress, merge
from adapters_store.merging.parts import Source
from adapters_store.merging.search import Found

_PARTS = ("a", "b", "d", "bias")
_BASE = "base.json"


def write_base(folder: Path, modules: Mapping[str, ModuleSpec], rslora: bool, found: Found | None = None) -> None:
    """In the server: what the work must know beside the sources. rslora: of the first one's PEFT config; found: of a
    search, weights in place of those of the order."""
    told = {
        "rslora": rslora,
        "found": asdict(found) if found else None,
        "modules": {name: asdict(spec) for name, spec in modules.items()},
    }
    (folder / _BASE).write_text(json.dumps(told))


def write_source(folder: Path, index: int, modules: Mapping[str, LowRank]) -> None:
    """In the server: the factors of one source, as they are. Raises OSError."""
    tensors.write(_source_file(folder, index), _named(modules))


def read_source(folder: Path, index: int) -> Mapping[str, tuple[Form, ...]]:
    """What `write_source` has written, one delta for each module, read when it is asked for."""
    return _Stored(safe_open(_source_file(folder, index), framework="pt"))


def run(folder: Path, order: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Merges what `order` says and writes `FORMS_FILE`; the facts of its forms, and of `lego` its clusters.

    A module of the sources is read when its turn comes. Raises AdapterInvalid, as `merge`.
    """
    base = json.loads((folder / _BASE).read_text())
    specs = {name: ModuleSpec(**spec) for name, spec in base["modules"].items()}
    found = base["found"]
    weights = found["weights"] if found else [source["weight"] for source in order["sources"]]
    sources = [
        Source(read_source(folder, index), weight, base["rslora"] and index == 0)
        for index, weight in enumerate(weights)
    ]
    merged = merge(sources, order["method"], order["parameters"], specs, progress, order["max_rank"])
    forms = {name: form for name, (form,) in merged.modules.items() if isinstance(form, LowRank)}
    tensors.write(folder / FORMS_FILE, _named(forms))
    clusters = {name: _told(found) for name, found in merged.clusters.items()}
    told = {"facts": facts(merged.modules), "matched": len(forms), "clusters": clusters}
    return told | ({"found": found} if found else {})


class _Stored(Mapping[str, tuple[Form, ...]]):
    """The modules of a source in an open safetensors file, read one by one."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._keys = set(file.keys())
        self._names = sorted({key.rpartition(".")[0] for key in self._keys})

    def __getitem__(self, name: str) -> tuple[Form, ...]:
        if f"{name}.a" not in self._keys:
            raise KeyError(name)
        found: dict[str, torch.Tensor] = {
            part: self._file.get_tensor(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in self._keys
        }
        return (LowRank(**found),)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _source_file(folder: Path, index: int) -> Path:
    return folder / f"source-{index}.safetensors"


def _named(modules: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    found = {f"{name}.{part}": getattr(form, part) for name, form in modules.items() for part in _PARTS}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _told(found: Clusters) -> dict[str, Any]:
    """How many units each unit of the result was made of; six digits, as last bits make no other adapter."""
    return {"members": [len(members) for members in found.members], "inertia": float(f"{found.inertia:.6g}")}

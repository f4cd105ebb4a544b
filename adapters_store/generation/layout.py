"""Where each number of an adapter stands when all of its low-rank deltas are one vector."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import LowRank
from adapters_store.safetensors_header import DTYPES

MAX_SCALE = float(1 << 16)  # a larger one is part of B
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """The delta of one module: A [rank, inputs], B [outputs, rank], and a bias [outputs] where there is one.

    scale: the value of every entry of `d`, at most `MAX_SCALE` either way.
    """

    name: str
    rank: int
    inputs: int
    outputs: int
    scale: float
    bias: bool = False

    def parts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "a", (self.rank, self.inputs)
        yield "b", (self.outputs, self.rank)
        if self.bias:
            yield "bias", (self.outputs,)


@dataclass(frozen=True, slots=True)
class Layout:
    """The modules in the order of the base's layers, and the type of their factors: float32, float16 or bfloat16."""

    modules: tuple[ModuleLayout, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, modules: Mapping[str, LowRank]) -> "Layout":
        """The layout of one adapter. Raises as `common`."""
        return cls.common([modules])

    @classmethod
    def common(cls, samples: Sequence[Mapping[str, LowRank]]) -> "Layout":
        """The layout that all samples have.

        A module's `d` is kept as its scale where it is one number, the same in all samples, not 0 and at most
        `MAX_SCALE`; else the scale is 1, and `flatten` multiplies B by `d`. Raises AdapterInvalid `layouts_differ`,
        `feature_unsupported` for factors of other types, `too_few_samples` for none at all.
        """
        if not samples or not samples[0]:
            raise AdapterInvalid("There is no adapter with low-rank deltas to learn from.", code="too_few_samples")
        names = sorted(samples[0], key=_natural)
        dtypes = {form.a.dtype for modules in samples for form in modules.values()}
        if not dtypes <= _NAMES.keys():
            text = "A generator learns factors of float32, float16 or bfloat16; use the versions before compression."
            raise AdapterInvalid(text, code="feature_unsupported")
        if len(dtypes) > 1:
            raise _differ("factors of several types")
        for modules in samples:
            _require_equal(modules, samples[0])
        made = (_module(name, [modules[name] for modules in samples]) for name in names)
        return cls(tuple(made), dtypes.pop())

    @property
    def numbers(self) -> int:
        """How many an adapter has: the length of its vector."""
        return sum(self.counts())

    @property
    def lora_bytes(self) -> int:
        """Of the factors as they are served, `d` included."""
        return self.numbers * self.dtype.itemsize + sum(4 * module.rank for module in self.modules)

    def counts(self) -> list[int]:
        """Numbers of each tensor, in the order of the vector."""
        return [math.prod(shape) for module in self.modules for _, shape in module.parts()]

    def flatten(self, modules: Mapping[str, LowRank]) -> torch.Tensor:
        """float32 [numbers]. Raises AdapterInvalid `layouts_differ`."""
        if modules.keys() != {module.name for module in self.modules}:
            raise _differ("other modules")
        pieces = []
        for module in self.modules:
            form = modules[module.name]
            found = {"a": form.a.float(), "b": _folded(form, module), "bias": form.bias}
            for part, shape in module.parts():
                tensor = found[part]
                if tensor is None or tensor.shape != shape or (form.bias is not None) != module.bias:
                    raise _differ(f"other shapes of `{module.name}`")
                pieces.append(tensor.reshape(-1))
        return torch.cat(pieces)

    def split(self, vector: torch.Tensor) -> dict[str, LowRank]:
        """`flatten` undone: factors of `dtype`, in memory of their own. vector: [numbers], of any floating type."""
        parts = iter(torch.split(vector, self.counts()))
        made = {}
        for module in self.modules:
            found = {part: next(parts).view(shape) for part, shape in module.parts()}
            factors = {part: found[part].to(self.dtype, copy=True) for part in ("a", "b")}
            bias = found["bias"].to(torch.float32, copy=True) if module.bias else None
            made[module.name] = LowRank(**factors, d=torch.full((module.rank,), module.scale), bias=bias)
        return made

    def to_json(self) -> dict[str, Any]:
        return {"dtype": _NAMES[self.dtype], "modules": [asdict(module) for module in self.modules]}

    @classmethod
    def from_json(cls, told: Any) -> "Layout":
        """`to_json` undone, of text that anyone may have written. Raises ValueError, TypeError or KeyError."""
        modules = tuple(ModuleLayout(**module) for module in told["modules"])
        for module in modules:
            sizes = (module.rank, module.inputs, module.outputs)
            if not all(type(size) is int and 0 < size < 1 << 31 for size in sizes) or type(module.bias) is not bool:
                raise ValueError("no sizes of a module")
            if type(module.name) is not str or type(module.scale) is not float:
                raise ValueError("no name or no scale of a module")
            if not abs(module.scale) <= MAX_SCALE:  # nor is NaN
                raise ValueError(f"a module's scale is at most {MAX_SCALE:.0f}")
        if not modules or len({module.name for module in modules}) < len(modules):
            raise ValueError("no modules, or one twice")
        return cls(modules, DTYPES[told["dtype"]])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _require_equal(modules: Mapping[str, LowRank], first: Mapping[str, LowRank]) -> None:
    if modules.keys() != first.keys():
        raise _differ("other modules")
    for name, form in modules.items():
        other = first[name]
        if form.a.shape != other.a.shape or form.b.shape != other.b.shape:
            raise _differ(f"another rank of `{name}`" if form.rank != other.rank else f"other shapes of `{name}`")
        if (form.bias is None) != (other.bias is None):
            raise _differ(f"a bias of `{name}`, and others none")


def _module(name: str, forms: Sequence[LowRank]) -> ModuleLayout:
    first = forms[0]
    scale = float(first.d[0])
    kept = 0 < abs(scale) <= MAX_SCALE and all(bool((form.d == first.d[0]).all()) for form in forms)
    sizes = (first.rank, first.a.shape[1], first.b.shape[0])
    return ModuleLayout(name, *sizes, scale if kept else 1.0, first.bias is not None)


def _folded(form: LowRank, module: ModuleLayout) -> torch.Tensor:
    if bool((form.d == module.scale).all()):
        return form.b.float()
    if module.scale != 1.0:
        raise _differ(f"another scale of `{module.name}`")
    return (form.b.double() * form.d.double()).float()


def _differ(what: str) -> AdapterInvalid:
    text = f"The adapters are not alike: one has {what}. A generator learns adapters of the same modules and ranks."
    return AdapterInvalid(text, code="layouts_differ")

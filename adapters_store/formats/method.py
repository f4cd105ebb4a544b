"""What a method of adapting is to the importer: its file's parts, their shapes, and the forms that they make."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NoReturn, TypeVar

import torch

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.formats.peft_match import Matcher
from adapters_store.formats.tuner_config import CommonConfig, TunerConfig
from adapters_store.forms import BaseSpec, Context, Form, ModuleSpec
from adapters_store.limits import Limits
from adapters_store.safetensors_header import DTYPES, INDICES, TensorEntry
from adapters_store.variants import NO_KNOBS, WHOLE, Knobs, Variant

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Read = Callable[[TensorEntry], torch.Tensor]
Made = TypeVar("Made")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as a method sees it.

    config: the method's own class; targets: the modules that it changes, in the order of the base; common: tensors of
    no module by name; read: gives a tensor in its own type; memo: see `once`; variant: which of the adapters in the
    file is asked for.
    """

    config: Any
    base: BaseSpec
    limits: Limits
    matcher: Matcher | None
    modules: Mapping[str, Mapping[str, TensorEntry]]
    common: Mapping[str, TensorEntry]
    read: Read
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    variant: Variant = WHOLE

    @cached_property
    def targets(self) -> tuple["Target", ...]:
        return tuple(Target(self, name) for name in self.base.modules if name in self.modules)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of no module, in float32."""
        return self.read(self.common[name]).float()

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for all modules of the file."""
        if name not in self.memo:
            self.memo[name] = make()
        found: Made = self.memo[name]
        return found


@dataclass(frozen=True)
class Target:
    """One module of an adapter: its tensors by part, and the base's facts."""

    file: AdapterFile
    name: str

    @property
    def spec(self) -> ModuleSpec:
        return self.file.base.modules[self.name]

    @property
    def inputs(self) -> int:
        return self.spec.in_features

    @property
    def outputs(self) -> int:
        return self.spec.out_features

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self.file.modules[self.name]

    @property
    def rank(self) -> int:
        """`r` of the config, or what `rank_pattern` says of this module."""
        assert self.file.matcher is not None
        return self.file.matcher.rank(self.name)

    def alpha(self, default: float) -> float:
        """default: the config's own; `alpha_pattern` may say otherwise of this module."""
        assert self.file.matcher is not None
        return self.file.matcher.alpha(self.name, default)

    def __contains__(self, part: str) -> bool:
        return part in self.entries

    def length(self, part: str, axis: int) -> int:
        """Of the first or the last axis (-1) of a part, as the file's header has it; 0 where there is none."""
        shape = self.entries[part].shape if part in self else ()
        return shape[axis] if shape else 0

    def tensor(self, part: str) -> torch.Tensor:
        """A part in float32; what bfloat16 and float16 hold it holds exactly."""
        return self.raw(part).float()

    def raw(self, part: str) -> torch.Tensor:
        """A part in its own type."""
        return self.file.read(self.entries[part])

    def indices(self, part: str, below: int) -> torch.Tensor:
        """A part of positions, int64, each from 0 to `below` - 1. Raises AdapterInvalid `bad_dtype` or `bad_index`."""
        found = self.raw(part)
        if found.dtype not in INDICES.values():
            self.refuse(f"holds `{part}` in another type than {' or '.join(INDICES)}", "bad_dtype")
        if int(found.min()) < 0 or int(found.max()) >= below:
            self.refuse(f"names positions in `{part}` outside 0 to {below - 1}", "bad_index")
        return found.long()

    def weight(self, *, factored: bool = False) -> torch.Tensor:
        """The base's weight of this module, float32 [out, in], as it is served.

        factored: it is taken apart (SVD, LU, its largest entries), which a weight rounded to 8 bits would change beyond
        use. Raises AdapterInvalid `feature_unsupported` where there is none such.
        """
        base = self.file.base
        if base.weight is None or (factored and base.rounded):
            raise AdapterInvalid(
                f"The adapter is made from the base's own weights of `{self.name}`, which this server does not keep; "
                "start it with `--quantize none`, or convert the adapter to a LoRA.",
                code="feature_unsupported",
                param="weights",
            )
        weight = base.weight(self.name).detach().to("cpu", torch.float32)
        return weight if self.spec.kind == "linear" else weight.T

    def bias(self) -> torch.Tensor | None:
        """The base's bias, float32 [out], or None."""
        if not self.spec.bias:
            return None
        if self.file.base.bias is None:
            self.refuse("has a bias that this server does not keep", "feature_unsupported")
        return self.file.base.bias(self.name).detach().to("cpu", torch.float32)

    def bound_rank(self, rank: int) -> None:
        """Raises AdapterInvalid `rank_limit`; to be called before a number of the config allocates anything."""
        if rank > self.file.limits.max_rank:
            raise rank_limit(self.name, rank, self.file.limits.max_rank)

    def refuse(self, problem: str, code: str = "shape_mismatch", param: str = "weights") -> NoReturn:
        raise AdapterInvalid(f"`{shorten(self.name)}` {problem}.", code=code, param=param)


def rank_limit(module: str, rank: int, limit: int) -> AdapterInvalid:
    return AdapterInvalid(
        f"`{shorten(module)}` needs rank {rank}; the limit is {limit}. Start the server with `--max-rank {rank}` to "
        "allow it.",
        code="rank_limit",
        param="weights",
    )


def _always(_: Mapping[str, Any]) -> bool:
    return True


def _no_shapes(_: AdapterFile) -> Shapes:
    return {}


@dataclass(frozen=True)
class Method:
    """How the files of one method are read.

    kind: as `AdapterInfo` shows it; peft_type, when: which configs are this method's; config: their fields;
    parts: names of a module's tensors after the module's own; spellings: ends of names as authors write them, and what
    they mean; shapes: what a module must hold, to the last part (it may look into `entries`, which are headers only);
    forms: what they mean; beside: modules that hold parts though the config does not select them; also: forms of
    modules of which the file holds nothing (a tied head); norms: the modules are the base's norms, seen as square
    linears; common: shapes of tensors of no module, whose names, or what of them stands before a dot, are in
    `common_parts`; context, invocation: as in `AdapterWeights`; check: refuses a config with AdapterInvalid before any
    weight is read; implied: the selected modules are changed though the file may hold nothing of their own; dtypes:
    those that a file may hold, by safetensors' name; knobs: what a request may choose (`adapters_store.variants`),
    which forms and context find in `AdapterFile.variant`.
    served: whether forms of its own or a plain low-rank delta; note: what a reader should know, one sentence; source:
    paper or code.
    """

    kind: str
    peft_type: str
    config: type[CommonConfig]
    served: Literal["native", "folded"]
    note: str
    source: str
    parts: frozenset[str] = frozenset()
    spellings: Mapping[str, str] = field(default_factory=dict)
    shapes: Callable[[Target], Shapes] = field(default=lambda _: {})
    forms: Callable[[Target], Iterable[Form]] = field(default=lambda _: ())
    beside: Callable[[AdapterFile], Collection[str]] = field(default=lambda _: ())
    also: Callable[[AdapterFile], Mapping[str, Iterable[Form]]] = field(default=lambda _: {})
    norms: bool = False
    common_parts: frozenset[str] = frozenset()
    common: Callable[[AdapterFile], Shapes] = _no_shapes
    context: Callable[[AdapterFile], Context | None] = field(default=lambda _: None)
    invocation: Callable[[Any], tuple[int, ...]] = field(default=lambda _: ())
    check: Callable[[Any], None] = field(default=lambda _: None)
    knobs: Callable[[AdapterFile], Knobs] = field(default=lambda _: NO_KNOBS)
    when: Callable[[Mapping[str, Any]], bool] = _always
    implied: bool = False
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: DTYPES)

    @property
    def has_targets(self) -> bool:
        return issubclass(self.config, TunerConfig)

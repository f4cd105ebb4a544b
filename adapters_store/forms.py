"""The forms an adapter takes per target module. Engine and kernels know forms, never file formats."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """`y += w * (B (d * (A x)) + bias)`; on an embedding, `A x` is the column of A for the token.

    a: [r, in] (embedding: [r, vocabulary]); b: [out, r]; d: float32 [r], every scale folded in;
    bias: float32 [out] with the scale folded in, or None. a and b share one of `kernels.segments.FACTOR_DTYPES`.
    """

    a: torch.Tensor
    b: torch.Tensor
    d: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class ReplacedWeight:
    """`y = W' x + b'` in place of the base product: a head saved whole (`modules_to_save`).

    weight: [out, in]; bias: float32 [out] or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


Form = LowRank | ReplacedWeight


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One base module that adapters may target: an `nn.Linear`, a `Conv1D`, or an `nn.Embedding`.

    `in_features` of an embedding is its vocabulary, `out_features` its dimension. `scale`: the factor by which an
    embedding multiplies its rows (Gemma); deltas are multiplied too.
    """

    kind: Literal["linear", "conv1d", "embedding"]
    in_features: int
    out_features: int
    bias: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """What an importer must know of the base model.

    id: public model id; fingerprint: digest of architecture, shapes and weights; modules: full dotted name
    (as in `named_modules()`) -> spec; head: name of the output head; tied: the head shares the embedding's weight;
    weight: reads a module's own weight in full precision, to compare with a copy of it inside an upload, or None.
    aliases: other names that mean the base, and no adapter.
    """

    id: str
    fingerprint: str
    modules: dict[str, ModuleSpec]
    head: str | None = None
    tied: bool = False
    weight: Callable[[str], torch.Tensor] | None = field(default=None, compare=False, repr=False)
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.id, *self.aliases)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter ready for the engine: for each base module its forms (at most one of each kind)."""

    digest: str
    modules: dict[str, tuple[Form, ...]]

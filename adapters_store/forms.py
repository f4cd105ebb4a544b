"""The forms an adapter takes per target module. Engine and kernels know forms, never file formats."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from adapters_store.kept import Kept
from kernels import reference


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

    def widened(self) -> "LowRank":
        """Itself."""
        return self


@dataclass(frozen=True, slots=True)
class Int4Rows:
    """Rows of numbers in four bits, as `kernels.reference.int4_values` reads them.

    numbers: uint8 [rows, 16 for each 32 columns]; scales: uint8 [rows, ceil(columns / 64)]; columns: a count.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    columns: int

    @property
    def bytes(self) -> int:
        return self.numbers.numel() + self.scales.numel()

    def values(self) -> torch.Tensor:
        """float32 [rows, columns], whole numbers."""
        return reference.int4_values(self.numbers, self.scales, self.columns)


@dataclass(frozen=True, slots=True)
class Int4LowRank:
    """A `LowRank` of four bits. a: [r, in]; b: B transposed, [r, out]; d, bias: as there. Not on embeddings."""

    a: Int4Rows
    b: Int4Rows
    d: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.d)

    def widened(self) -> LowRank:
        """What it means, with float32 factors: exact."""
        return LowRank(self.a.values(), self.b.values().T.contiguous(), self.d, self.bias)


@dataclass(frozen=True, slots=True)
class SharedBasis:
    """`y += w * (U (C (V x)) + bias)`: U and V are those of many adapters, C is one's own.

    u: [out, r]; v: [r, in] (embedding: [r, vocabulary]), of one floating type; core: float32 [r], the diagonal of C, or
    [r, r]; bias: float32 [out] or None.
    """

    u: torch.Tensor
    v: torch.Tensor
    core: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.v.shape[0]

    def widened(self) -> LowRank:
        """What it means as a delta of its own: A = V, B = U C, float32 (a diagonal C is kept as `d`)."""
        if self.core.dim() == 1:
            return LowRank(self.v.float(), self.u.float(), self.core, self.bias)
        b = (self.u.double() @ self.core.double()).float()
        return LowRank(self.v.float(), b, torch.ones(self.rank), self.bias)


@dataclass(frozen=True, slots=True)
class GatedLowRank:
    """`y += w * (B (d * g(x) * (A x)) + bias)`: each token uses `active` of the ranks, chosen by a router of its own.

    a: [r, in]; b: [out, r]; d: float32 [r]; bias: float32 [out] or None, as in `LowRank`; router: [rows, in] of a
    floating type, rows a divisor of r; router_bias: float32 [r] or None; g: `kernels.reference.lora_gate`. Not on
    embeddings. Source: SMoRA (arXiv 2501.15103).
    """

    a: torch.Tensor
    b: torch.Tensor
    d: torch.Tensor
    router: torch.Tensor
    router_bias: torch.Tensor | None
    active: int
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Sparse:
    """`y += w * (S x)`, S in compressed rows; on an embedding `y += w * S[token]`.

    start: int32 [rows + 1]; column: int32 [n], ascending within a row; value: float32 [n], every scale folded in. S is
    [out, in]; on an embedding [vocabulary, dimension].
    """

    start: torch.Tensor
    column: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class SignRows:
    """A matrix of +1 and -1, a bit each: bit `j % 8` of byte `j // 8` of a row is set for +1.

    bits: uint8 [rows, ceil(columns / 8)]; columns: a count.
    """

    bits: torch.Tensor
    columns: int


@dataclass(frozen=True, slots=True)
class Dense:
    """`y += w * (scale * (D x))`: a delta of full rank. Not on embeddings.

    weight: [out, in] of one of `kernels.segments.FACTOR_DTYPES`, or signs (BitDelta, arXiv 2402.10193); scale: float32
    [out].
    """

    weight: torch.Tensor | SignRows
    scale: torch.Tensor


@dataclass(frozen=True, slots=True)
class InputTransform:
    """`x -> (1 - w) x + w R x` before the base product only; deltas see the original x. R is block-diagonal.

    blocks: float32 [in / size, size, size], the blocks of R in order (size 1: a scale of each input). Not on
    embeddings. Source: OFT (arXiv 2306.07280), IA3 on inputs (arXiv 2205.05638).
    """

    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class OutputScale:
    """`y -> y + w * ((scale - 1) * y + pair * partner(y) + bias)`, after the base product, its bias and all deltas.

    scale, pair, bias: float32 [out] or None (1, 0, 0). partner(y)[i] is y[i + stride] in the first half of each group
    of `2 * stride` neighbours and y[i - stride] in the second. On embeddings and norms too. Sources: DoRA (arXiv
    2402.09353), IA3 (arXiv 2205.05638), RoAd (arXiv 2409.00119: pair and stride).
    """

    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    pair: torch.Tensor | None = None
    stride: int = 1


@dataclass(frozen=True, slots=True)
class ReplacedWeight:
    """`y = W' x + b'` in place of the base product: a head saved whole (`modules_to_save`).

    weight: [out, in]; bias: float32 [out] or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


Delta = LowRank | Int4LowRank | SharedBasis  # of a rank that needs no gate
Form = Delta | ReplacedWeight | GatedLowRank | Sparse | Dense | InputTransform | OutputScale


@dataclass(frozen=True, slots=True)
class Context:
    """Virtual tokens before the prompt, as many as `num_tokens`, at positions 0, 1, ...

    embeddings: [n, hidden], what the first layer reads of them (prompt tuning, arXiv 2104.08691); or keys, values:
    [layers, n, kv_heads, dim], what every layer's cache holds of them, as they are (prefix tuning, arXiv 2101.00190).
    """

    embeddings: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        if self.embeddings is not None:
            return self.embeddings.shape[0]
        return 0 if self.keys is None else self.keys.shape[1]


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
    weight: reads a module's own weight in full precision, to compare with a copy of it inside an upload, or None;
    bias: its bias, likewise.
    aliases: other names that mean the base, and no adapter; rounded: `weight` gives what 8-bit products use; norms:
    full name -> size of the layer norms and RMS norms whose output adapters may scale; norm_offsets: what some of them
    add to their weight before they multiply (Gemma: 1), for the others 0; norm_biases: those that have a bias;
    input_embedding: name of the embedding of the prompt's tokens; kv: layers, key-value heads, and size of a head;
    kept: decompositions of its weights.
    """

    id: str
    fingerprint: str
    modules: dict[str, ModuleSpec]
    head: str | None = None
    tied: bool = False
    weight: Callable[[str], torch.Tensor] | None = field(default=None, compare=False, repr=False)
    aliases: tuple[str, ...] = ()
    rounded: bool = False
    bias: Callable[[str], torch.Tensor] | None = field(default=None, compare=False, repr=False)
    norms: Mapping[str, int] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept, compare=False, repr=False)
    norm_offsets: Mapping[str, float] = field(default_factory=dict)
    norm_biases: frozenset[str] = frozenset()
    input_embedding: str | None = None
    kv: tuple[int, int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.id, *self.aliases)

    @property
    def embeddings(self) -> frozenset[str]:
        return frozenset(name for name, spec in self.modules.items() if spec.kind == "embedding")


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter ready for the engine: for each base module its forms (at most one of each kind).

    context: virtual tokens, or None; invocation: token ids from whose last occurrence in the prompt on the adapter acts
    (aLoRA, arXiv 2504.12397), or () for everywhere.
    """

    digest: str
    modules: dict[str, tuple[Form, ...]]
    context: Context | None = None
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MadeForms:
    """Forms that the server has made of a name's current version, to become its next.

    told: what the manifest says besides: kind, warnings, provenance, compression; if_match: digest of that version.
    """

    name: str
    modules: Mapping[str, tuple[Form, ...]]
    told: Mapping[str, Any]
    if_match: str

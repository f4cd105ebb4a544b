"""What is merged: adapters as low-rank deltas, each with a weight, taken module by module."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import Delta, Form, LowRank, ModuleSpec


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to merge.

    modules: its forms by module, as in `AdapterWeights`; weight: any finite number; rslora: whether its PEFT config
    says `use_rslora`, which nothing but the mode `peft_exact` asks.
    """

    modules: Mapping[str, tuple[Form, ...]]
    weight: float = 1.0
    rslora: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One source's delta of a module, `weight * B diag(d) A`. source: its index; form: of floating factors."""

    source: int
    form: LowRank
    weight: float


@dataclass(frozen=True, slots=True)
class Stack:
    """All parts of one module, in the order of the sources; at least one.

    ranks: the largest rank of each source over all its modules, which PEFT allocates by, or () where nobody asks;
    rslora: that of the first source.
    """

    name: str
    spec: ModuleSpec
    parts: tuple[Part, ...]
    ranks: tuple[int, ...] = ()
    rslora: bool = False

    @property
    def rank(self) -> int:
        """The largest of the parts' ranks."""
        return max(part.form.rank for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """That of the parts' factors if they have one, else float32."""
        found = {part.form.a.dtype for part in self.parts}
        return found.pop() if len(found) == 1 else torch.float32

    @property
    def bias(self) -> torch.Tensor | None:
        """The weighted sum of the biases, float32 [out], or None."""
        found = [part.weight * part.form.bias.double() for part in self.parts if part.form.bias is not None]
        return torch.stack(found).sum(dim=0).float() if found else None

    def generator(self, seed: int, part: int = 0) -> torch.Generator:
        """Random numbers that depend on the seed, the module and the part alone, whatever else is merged."""
        text = f"{seed}:{part}:{self.name}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def low_rank(name: str, forms: tuple[Form, ...]) -> LowRank:
    """The forms of a module as one delta of floating factors; exact, in float32 where they were of fewer bits.

    Raises AdapterInvalid `feature_unsupported`, which names the form, for one that is no low-rank delta.
    """
    wide = []
    for form in forms:
        if not isinstance(form, Delta):
            kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(form).__name__).lower()
            text = f"`{name}` has the form `{kind}`, which is no low-rank delta; only such can be merged."
            raise AdapterInvalid(text, code="feature_unsupported", param="sources")
        wide.append(_floating(form.widened()))
    if len(wide) == 1:
        return wide[0]
    a, b = torch.cat([each.a.float() for each in wide]), torch.cat([each.b.float() for each in wide], dim=1)
    biases = [each.bias for each in wide if each.bias is not None]
    return LowRank(a, b, torch.cat([each.d for each in wide]), torch.stack(biases).sum(dim=0) if biases else None)


def _floating(form: LowRank) -> LowRank:
    if form.a.is_floating_point():
        return form
    return LowRank(form.a.float(), form.b.float(), form.d, form.bias)

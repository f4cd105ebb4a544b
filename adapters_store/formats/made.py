"""What a method makes of its file: forms within bounds, and what may be said of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass

import torch

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterInvalid
from adapters_store.formats.form_shapes import all_fit
from adapters_store.formats.method import Method, rank_limit
from adapters_store.formats.method_file import Opened
from adapters_store.forms import (
    Context,
    Dense,
    Form,
    GatedLowRank,
    InputTransform,
    Int4LowRank,
    LowRank,
    OutputScale,
    ReplacedWeight,
    SharedBasis,
    Sparse,
)
from adapters_store.limits import Limits

NAMES: dict[type, str] = {
    LowRank: "low_rank",
    Int4LowRank: "low_rank",
    GatedLowRank: "gated_low_rank",
    SharedBasis: "shared_basis",
    Sparse: "sparse",
    Dense: "dense",
    InputTransform: "input_transform",
    OutputScale: "output_scale",
    ReplacedWeight: "replaced_weight",
    Context: "context",
}


@dataclass(slots=True)
class Seen:
    """Facts of the forms that have passed: their names, ranks, bytes, and whether any changes anything."""

    limits: Limits
    names: set[str] = field(default_factory=set)
    ranks: list[int] = field(default_factory=list)
    form_bytes: int = 0
    acts: bool = False

    def add(self, module: str, form: Form | Context) -> None:
        """Raises AdapterInvalid: `nonfinite_weights`, `rank_limit`, `adapter_too_large`."""
        rank = getattr(form, "rank", None)
        if rank is not None and rank > self.limits.max_rank:
            raise rank_limit(module, rank, self.limits.max_rank)
        for tensor in tensors(form):
            self.form_bytes += tensor.numel() * tensor.itemsize
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise AdapterInvalid(
                    f"`{shorten(module)}` comes to values that are NaN or infinite.",
                    code="nonfinite_weights",
                    param="weights",
                )
        if self.form_bytes > self.limits.form_bytes:
            raise AdapterInvalid(
                f"The adapter takes over {self.limits.form_bytes} bytes as it is served, which is the limit.",
                code="adapter_too_large",
                param="weights",
            )
        self.names.add(NAMES[type(form)])
        self.ranks += [] if rank is None else [rank]
        self.acts = self.acts or _acts(form)


def forms_of(method: Method, opened: Opened) -> Iterator[tuple[str, tuple[Form, ...]]]:
    """The forms of one module after another, so that an inspection holds one module's only.

    Raises AdapterInvalid `shape_mismatch` for what the kernels could not take.
    """
    base = opened.file.base
    replaced = {item.module: item for item in opened.replaced}
    targets = {target.name: target for target in opened.file.targets}
    also = method.also(opened.file)
    for name in dict.fromkeys((*base.modules, *base.norms)):  # of norm tuning the modules are the norms
        forms: list[Form] = []
        if name in replaced:
            item = replaced[name]
            bias = None if item.bias is None else opened.file.read(item.bias).float()
            forms.append(ReplacedWeight(opened.file.read(item.weight), bias))
        if name in targets:
            forms += method.forms(targets[name])
        forms += also.get(name, ())
        if not forms:
            continue
        if not all_fit(name, forms, base):
            text = f"What the file holds for `{shorten(name)}` does not fit the base."
            raise AdapterInvalid(text, code="shape_mismatch", param="weights")
        yield name, tuple(forms)


def tensors(form: Form | Context) -> list[torch.Tensor]:
    """Every tensor of a form, those inside its parts too."""
    found: list[torch.Tensor] = []
    for item in fields(form):
        value = getattr(form, item.name)
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif is_dataclass(value) and not isinstance(value, type):
            found += tensors(value)  # type: ignore[arg-type]
    return found


def _acts(form: Form | Context) -> bool:
    """Whether it may change a result."""
    if isinstance(form, OutputScale):
        scaled = form.scale is not None and bool((form.scale != 1).any())
        return scaled or any(part is not None and bool(part.any()) for part in (form.bias, form.pair))
    if isinstance(form, InputTransform):
        return not torch.equal(form.blocks, torch.eye(form.blocks.shape[-1]).expand_as(form.blocks))
    if isinstance(form, Context | ReplacedWeight):
        return True
    bias = getattr(form, "bias", None)
    if bias is not None and bool(bias.any()):
        return True
    if isinstance(form, Sparse):
        return bool(form.value.any())
    if isinstance(form, Dense):
        return bool(form.scale.any())
    if isinstance(form, LowRank | GatedLowRank):
        return all(bool(part.any()) for part in (form.a, form.b, form.d))
    return True

"""One adapter in the base's own weights, while nothing else runs: its requests then cost what base requests cost."""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from adapters_store.errors import AdapterInvalid, CodedError
from adapters_store.forms import AdapterWeights, LowRank
from adapters_store.merging.parts import low_rank
from server.engine.request import WeightedAdapter
from server.model.adapter_linear import AdapterLinear
from server.model.base import BaseModel
from server.model.quantize import Int8Linear
from server.model.spec import adapter_kind

log = logging.getLogger(__name__)


class BaseInUse(CodedError):
    """Requests of the base or of other adapters are running or waiting (409)."""

    status = 409
    code = "base_in_use"


class MergedBase:
    """`W + B diag(d) A` in place of `W`, in every linear that the adapter changes, and a copy of each `W` on the host.

    Taking it out copies these back: every bit is as before. On the engine's thread, between two steps.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # a parameter, and what it was
        self.digest: str | None = None

    def make_way(self, adapters: Sequence[WeightedAdapter]) -> None:
        """Before a request under these adapters runs: what is merged is taken out, unless it is what they are."""
        if self.digest is not None and not _is_alone(adapters, self.digest):
            self.take_out()

    @torch.inference_mode()
    def merge(self, weights: AdapterWeights, asked: Iterable[Sequence[WeightedAdapter]] = ()) -> None:
        """Adds an adapter; one that is in already is taken out before. All or nothing.

        weights: by the digest that its requests name; asked: the adapters of every request that is there. Products
        are float32; the sum is rounded to the weight's type.
        Raises BaseInUse; AdapterInvalid `feature_unsupported`: the base is rounded to int8, or the adapter is more
        than low-rank deltas of linears.
        """
        if not all(_is_alone(adapters, weights.digest) for adapters in asked):
            raise BaseInUse(
                "Other requests run or wait; an adapter goes into the base only while there are none. Retry."
            )
        if weights.context is not None or weights.invocation:
            raise _refused("it does not act on every token of the prompt alike")
        changes = [self._change(name, low_rank(name, forms)) for name, forms in weights.modules.items()]
        self.take_out()
        try:
            for change in changes:
                self._apply(*change)
        except BaseException:
            self.take_out()
            raise
        self.digest = weights.digest
        log.info("adapter_merged_into_base", extra={"digest": weights.digest, "modules": len(changes)})

    @torch.inference_mode()
    def take_out(self) -> None:
        """The base as it was loaded. Nothing happens if nothing was merged."""
        for parameter, kept in self._kept:
            parameter.copy_(kept)
        if self.digest is not None:
            log.info("adapter_taken_out_of_base", extra={"digest": self.digest})
        self._kept.clear()
        self.digest = None

    def _apply(self, weight: torch.Tensor, bias: torch.Tensor | None, form: LowRank, transposed: bool) -> None:
        self._keep(weight)
        delta = (form.b.float() * form.d) @ form.a.float()
        weight.add_((delta.T if transposed else delta).to(weight.device))
        if form.bias is not None and bias is not None:
            self._keep(bias)
            bias.add_(form.bias.to(bias.device))

    def _keep(self, parameter: torch.Tensor) -> None:
        self._kept.append((parameter, parameter.detach().to("cpu", copy=True)))

    def _change(self, name: str, form: LowRank) -> tuple[torch.Tensor, torch.Tensor | None, LowRank, bool]:
        """Weight and bias to change, the delta, and whether the weight stands transposed; refuses what cannot be."""
        module = self._base.model.get_submodule(name)
        if not isinstance(module, AdapterLinear):
            raise _refused(f"`{name}` is no linear")
        inner: nn.Module = module.base
        if isinstance(inner, Int8Linear):
            raise _refused("the base is rounded to int8, which cannot hold a delta exactly")
        weight, bias = inner.weight, inner.bias
        assert isinstance(weight, torch.Tensor)
        if any(each.weight is weight for each in self._base.model.modules() if isinstance(each, nn.Embedding)):
            raise _refused(f"`{name}` shares its weight with an embedding")
        if form.bias is not None and not isinstance(bias, torch.Tensor):
            raise _refused(f"it adds a bias to `{name}`, which has none")
        return weight, bias if isinstance(bias, torch.Tensor) else None, form, adapter_kind(inner) == "conv1d"


def _is_alone(adapters: Sequence[WeightedAdapter], digest: str) -> bool:
    """Whether these are this one adapter, unweighted."""
    return len(adapters) == 1 and adapters[0].digest == digest and adapters[0].weight == 1.0


def _refused(why: str) -> AdapterInvalid:
    return AdapterInvalid(f"The adapter cannot be merged into the base: {why}.", code="feature_unsupported")

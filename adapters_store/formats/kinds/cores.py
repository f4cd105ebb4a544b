"""A small trained matrix between two frozen factors: LoRA-XS (arXiv 2405.17604), LoRA-SB (arXiv 2411.19557), LaMDA
(arXiv 2406.12832).

LoRA-XS takes its factors from the base's own weights, so that one basis serves all its adapters; LoRA-SB from the first
gradient, so that they must be in the file; LaMDA trains B for a while, too.
"""

import torch

from adapters_store.formats.kinds import decomposed, outside
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.peft_config import PeftConfig
from adapters_store.forms import SharedBasis

_A, _B = "lora_A.weight", "lora_B.weight"
_LATENT, _SIGMA = "lora_latent_mapping.weight", "sigma.weight"
# LoRA-XS's attribute begins with the adapter's name, so PEFT, which takes `.default` away, runs it into the module's.
_SPELLINGS = {f".default_{_LATENT}": f".{_LATENT}", f"_{_LATENT}": f".{_LATENT}"}


def _factors(target: Target) -> Shapes:
    outside.linear(target)
    return {_A: (target.rank, target.inputs), _B: (target.outputs, target.rank)}


def _latent_shapes(target: Target) -> Shapes:
    return {**_factors(target), _LATENT: (target.rank, target.rank)}


def _xs_shapes(target: Target) -> Shapes:
    """Both factors, or neither."""
    if _A in target or _B in target:
        return _latent_shapes(target)
    outside.linear(target)
    if target.rank > min(target.inputs, target.outputs):
        target.refuse(f"has no {target.rank} singular values")
    return {_LATENT: (target.rank, target.rank)}


def _sigma_shapes(target: Target) -> Shapes:
    return {**_factors(target), _SIGMA: (target.rank, target.rank)}


def _shipped(target: Target, part: str) -> list[SharedBasis]:
    """`s B R A` with the file's own B and A."""
    a, b = target.raw(_A), target.raw(_B)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return [SharedBasis(b.to(dtype), a.to(dtype), target.tensor(part) * outside.scale(target))]


def _xs_forms(target: Target) -> list[SharedBasis]:
    """Without factors in the file: of `svd(W^T) = U S V`, A is `(U S)^T` and B is `V^T`, the largest r of both."""
    if _A in target:
        return _shipped(target, _LATENT)
    target.bound_rank(target.rank)
    b, values, right = decomposed.singular_of_transposed(target, target.rank)
    a = values[: target.rank, None] * right
    return [SharedBasis(b, a, target.tensor(_LATENT) * outside.scale(target))]


def _latent_forms(target: Target) -> list[SharedBasis]:
    return _shipped(target, _LATENT)


def _sigma_forms(target: Target) -> list[SharedBasis]:
    return _shipped(target, _SIGMA)


METHODS = (
    Method(
        kind="lora_xs",
        peft_type="LORA_XS",
        config=PeftConfig,
        served="native",
        note="A core in a shared basis, which is the file's, or the SVD of the base's weights where the file has none.",
        source="arXiv 2405.17604",
        parts=frozenset({_A, _B, _LATENT}),
        spellings=_SPELLINGS,
        shapes=_xs_shapes,
        forms=_xs_forms,
        check=outside.check_lora,
    ),
    Method(
        kind="lora_sb",
        peft_type="LORA_SB",
        config=PeftConfig,
        served="native",
        note="A core between the file's own factors, which come from a gradient and not from the base.",
        source="arXiv 2411.19557",
        parts=frozenset({_A, _B, _LATENT}),
        spellings=_SPELLINGS,
        shapes=_latent_shapes,
        forms=_latent_forms,
        check=outside.check_lora,
    ),
    Method(
        kind="lamda",
        peft_type="LAMDA",
        config=PeftConfig,
        served="native",
        note="A core between the file's own factors.",
        source="arXiv 2406.12832",
        parts=frozenset({_A, _B, _SIGMA}),
        shapes=_sigma_shapes,
        forms=_sigma_forms,
        check=outside.check_lora,
    ),
)

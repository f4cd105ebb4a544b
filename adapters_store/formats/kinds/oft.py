"""OFT (arXiv 2306.07280, 2506.19847): the input of a module is turned, block by block."""

from typing import ClassVar

import torch

from adapters_store.formats.kinds.folding import refuse_bias, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad, unsupported
from adapters_store.forms import Form, InputTransform

_PART = "oft_R.weight"
_MAX_TERMS = 64
_CHANGED_IN = (0, 18)  # PEFT's release in which the Neumann series got another last term


class OftConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. `r` is a number of blocks."""

    least_rank: ClassVar[int] = 0

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5


def _check(config: OftConfig) -> None:
    refuse_bias(config)
    if min(config.r, config.oft_block_size) < 0 or (config.r == 0) == (config.oft_block_size == 0):
        bad("must give one of `r` and `oft_block_size`, the other being 0", "oft_block_size")
    if config.use_cayley_neumann and config.num_cayley_neumann_terms > _MAX_TERMS:
        unsupported([f"num_cayley_neumann_terms over {_MAX_TERMS}"])
    if config.use_cayley_neumann and _release(config.peft_version) < _CHANGED_IN:
        unsupported(["a Cayley-Neumann series of PEFT before 0.18, which was another one (`peft_version` says which)"])


def _release(version: str | None) -> tuple[int, ...]:
    numbers = (version or "0.0").split(".")[:2]
    return tuple(int(number) if number.isdecimal() and len(number) < 9 else 0 for number in numbers)


def block_size(inputs: int, blocks: int, size: int) -> int:
    """What PEFT makes of the wish for so many blocks, or for blocks of this size; the other is 0."""
    return _divisor(inputs, size) if blocks == 0 else inputs // _divisor(inputs, blocks)


def _divisor(inputs: int, wish: int) -> int:
    """The divisor of `inputs` next to a wish, the smaller of two (`OFTLayer.adjust_oft_parameters`)."""
    if wish >= inputs:
        return inputs
    below = next(number for number in range(wish, 0, -1) if inputs % number == 0)
    above = next(number for number in range(wish, inputs + 1) if inputs % number == 0)
    return below if wish - below <= above - wish else above


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    config = target.file.config
    size = block_size(target.inputs, config.r, config.oft_block_size)
    if size < 2:
        target.refuse("would be turned in blocks of one, which is nothing", "bad_config", "oft_block_size")
    return {_PART: (1 if config.block_share else target.inputs // size, size * (size - 1) // 2)}


def _forms(target: Target) -> list[Form]:
    """`W (R^T x) + b`: PEFT multiplies rows, so its blocks are turned over here."""
    config = target.file.config
    size = block_size(target.inputs, config.r, config.oft_block_size)
    skew = _skew(target.tensor(_PART).double(), size)
    if config.coft:
        skew = _constrained(skew, config.eps)
    turned = neumann(skew, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(skew)
    blocks = turned.mT.float().expand(target.inputs // size, size, size)
    return [InputTransform(blocks.contiguous())]


def _skew(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """[n, size, size] of the numbers above the diagonal, [n, size (size - 1) / 2], row by row."""
    found = numbers.new_zeros(len(numbers), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    found[:, rows, columns] = numbers
    return found - found.mT


def _constrained(skew: torch.Tensor, eps: float) -> torch.Tensor:
    """COFT: no block further from 0 than `eps / sqrt(blocks)`, projected at every use (`_project_batch`)."""
    norm, most = skew.flatten(1).norm(dim=1)[:, None, None], eps / len(skew) ** 0.5
    return torch.where(norm <= most, skew, skew * (most / norm))


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """`(I - Q) (I + Q)^-1`, exactly orthogonal."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    found: torch.Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return found


def neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """The series of the same, cut: `I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)`, with PEFT's treatment of few terms."""
    found = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    if terms > 1:
        found += 2 * skew
    if terms > 2:
        power = skew @ skew
        found += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            found += 2 * power
        found += power @ skew
    return found


METHODS = (
    Method(
        kind="oft",
        peft_type="OFT",
        config=OftConfig,
        served="native",
        note="The input is turned before the base product; the blocks are computed once, when it is imported.",
        source="arXiv 2306.07280, 2506.19847",
        parts=frozenset({_PART, "oft_embedding_R.weight"}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)

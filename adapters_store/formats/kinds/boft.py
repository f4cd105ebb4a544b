"""BOFT (arXiv 2311.06243): OFT by several factors whose blocks are interleaved like a butterfly, and output scales."""

import torch

from adapters_store.formats.kinds.folding import refuse_bias, refuse_kinds
from adapters_store.formats.kinds.oft import cayley
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Form, InputTransform, OutputScale


class BoftConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True


def _check(config: BoftConfig) -> None:
    refuse_bias(config)
    size, blocks = config.boft_block_size, config.boft_block_num
    if min(size, blocks) < 0 or (size == 0) == (blocks == 0):
        bad("must give one of `boft_block_size` and `boft_block_num`, the other being 0", "boft_block_size")
    if config.boft_n_butterfly_factor < 1:
        bad("has no butterfly factor", "boft_n_butterfly_factor")


def _factors(target: Target) -> int:
    """As many as the file has: without PEFT's CUDA extension it is 1, whatever the config says."""
    wanted: int = target.file.config.boft_n_butterfly_factor
    shape = target.entries["boft_R"].shape if "boft_R" in target else (wanted,)
    return 1 if shape[:1] == (1,) else wanted


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    config, factors = target.file.config, _factors(target)
    size = config.boft_block_size or target.inputs // config.boft_block_num
    blocks = config.boft_block_num or target.inputs // size
    if size * blocks != target.inputs or (factors > 1 and (size % 2 or factors > 32 or blocks % 2 ** (factors - 1))):
        target.refuse(f"has {target.inputs} inputs, which {blocks} blocks of {size} do not make up", "bad_config")
    return {"boft_R": (factors, blocks, size, size), "boft_s": (target.outputs, 1)}


def _forms(target: Target) -> list[Form]:
    """`s * W (M^T x) + b`, M the product of the factors: block-diagonal, of blocks 2^(factors - 1) times as large."""
    numbers = target.tensor("boft_R").double()
    turned = cayley((numbers - numbers.mT) / 2)
    group = 2 ** (len(turned) - 1)
    blocks = _joined(turned[0], group)
    for index in range(1, len(turned)):
        order = _order(turned.shape[-1], index, group)
        blocks = _joined(turned[index], group)[:, order[:, None], order] @ blocks
    scale, bias = target.tensor("boft_s").flatten(), target.bias()
    return [
        InputTransform(blocks.mT.float().contiguous()),
        OutputScale(scale, None if bias is None else (1 - scale) * bias),
    ]


def _joined(blocks: torch.Tensor, group: int) -> torch.Tensor:
    """[blocks / group, group * size, group * size]: neighbours on the diagonal of one block."""
    count, size, _ = blocks.shape
    found = blocks.new_zeros(count // group, group, size, group, size)
    each = torch.arange(group)
    found[:, each, :, each] = blocks.view(-1, group, size, size).transpose(0, 1)
    return found.view(-1, group * size, group * size)


def _order(size: int, index: int, group: int) -> torch.Tensor:
    """The permutation of factor `index` within one joined block: of each run of `2^index` blocks, cut into halves of a
    block, the even ones come first (`BOFTLayer.block_butterfly_perm`)."""
    half, halves = size // 2, 2 ** (index + 1)
    run = torch.cat([torch.arange(0, halves, 2), torch.arange(1, halves, 2)])
    within = (run[:, None] * half + torch.arange(half)).flatten()
    starts = torch.arange(0, group * size, halves * half)
    return (starts[:, None] + within).flatten()


METHODS = (
    Method(
        kind="boft",
        peft_type="BOFT",
        config=BoftConfig,
        served="native",
        note="The input is turned before the base product, the output scaled after it; the factors become one.",
        source="arXiv 2311.06243",
        parts=frozenset({"boft_R", "boft_s"}),
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)

"""C3A (arXiv 2407.19342): a delta of circulant blocks, each given by one row."""

import torch

from adapters_store.formats.kinds.folding import dense, refuse_bias, refuse_kinds
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form


class C3AConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = None
    bias: str = "none"
    init_weights: bool | str | None = "xavier_uniform"


def _shapes(target: Target) -> Shapes:
    """The kernel's own last axis says which of the config's block sizes is the module's."""
    refuse_kinds(target, "embedding", "conv1d")
    config = target.file.config
    sizes = {config.block_size, *(config.block_size_pattern or {}).values()}
    found = target.length("c3a_kernel", -1)
    size = found if found in sizes else config.block_size
    if size < 1 or target.inputs % size or target.outputs % size:
        target.refuse(f"is {target.outputs} x {target.inputs}, which blocks of {size} do not fill")
    return {"c3a_kernel": (target.outputs // size, target.inputs // size, size)}


def _forms(target: Target) -> list[Form]:
    """Row u and column t of a block hold w[(t - u) mod b] / in, which is what PEFT's three FFTs come to."""
    kernel = target.tensor("c3a_kernel")
    size = kernel.shape[-1]
    turned = (torch.arange(size)[None, :] - torch.arange(size)[:, None]) % size
    blocks = kernel[:, :, turned]  # out / b, in / b, b, b
    return dense(blocks.permute(0, 2, 1, 3).reshape(target.outputs, target.inputs) / target.inputs)


METHODS = (
    Method(
        kind="c3a",
        peft_type="C3A",
        config=C3AConfig,
        served="native",
        note="A dense delta as large as the weight, its circulant blocks written out.",
        source="arXiv 2407.19342",
        parts=frozenset({"c3a_kernel"}),
        shapes=_shapes,
        forms=_forms,
        check=refuse_bias,
    ),
)

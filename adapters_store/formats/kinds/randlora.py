"""RandLoRA (arXiv 2502.00987): a full-rank delta from random bases for all modules, scaled by learnt vectors."""

import math

import torch

from adapters_store.formats.kinds.folding import dense, refuse_bias, refuse_kinds, refuse_seed
from adapters_store.formats.kinds.vera import largest
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form

_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_A, _B = "randlora_A", "randlora_B"
_SPARSITY = 3  # of `sparse`; `very_sparse` takes the root of the smaller side


class RandLoraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: float = 640
    bias: str = "none"
    init_weights: bool = True


def _check(config: RandLoraConfig) -> None:
    refuse_bias(config)
    refuse_seed(config, "projection_prng_key")


def _bases(inputs: int, outputs: int, rank: int) -> int:
    """How many it takes to reach full rank."""
    return math.ceil(min(inputs, outputs) / rank)


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    rank, smaller = target.file.config.r, min(target.inputs, target.outputs)
    target.bound_rank(rank)
    count = _bases(target.inputs, target.outputs, rank)
    copies = _common(target.file) if _A in target or _B in target else {}
    return {_LAMBDA: (rank, count), _GAMMA: (count, smaller), **copies}


def _sizes(file: AdapterFile) -> dict[str, tuple[int, int, int]]:
    inputs, outputs = largest(file)
    rank = file.config.r
    return {_A: (rank, 1, min(inputs, outputs)), _B: (max(inputs, outputs), _bases(inputs, outputs, rank), rank)}


def _common(file: AdapterFile) -> Shapes:
    return _sizes(file) if file.config.save_projection else {}


def _random(file: AdapterFile) -> tuple[torch.Tensor, torch.Tensor]:
    """As saved, or drawn again as PEFT draws them on a machine with bfloat16."""
    if file.config.save_projection:
        return file.tensor(_A), file.tensor(_B)
    sizes, generator = _sizes(file), torch.Generator().manual_seed(file.config.projection_prng_key)
    if file.config.very_sparse or file.config.sparse:
        sparsity = math.sqrt(sizes[_A][2]) if file.config.very_sparse else _SPARSITY
        found = [_signs(torch.rand(size, generator=generator), sparsity) for size in sizes.values()]
    else:
        rows, count, rank = sizes[_B]
        found = [
            _kaiming(sizes[_A], generator),
            torch.cat([_kaiming((rows, 1, rank), generator) for _ in range(count)], dim=1),
        ]
    return (found[0] / found[0].std()).float(), (found[1] / found[1].std()).float()


def _kaiming(size: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    empty = torch.empty(size, dtype=torch.bfloat16)
    return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)


def _signs(drawn: torch.Tensor, sparsity: float) -> torch.Tensor:
    return (drawn > 1 - 1 / (2 * sparsity)).float() - (drawn < 1 / (2 * sparsity)).float()


def _forms(target: Target) -> list[Form]:
    """`s B (lambda * A * gamma)`, or its transpose's order where there are fewer outputs than inputs.

    Rows of A count ranks first and bases second, columns of B bases first and ranks second, as in PEFT.
    """
    file, rank = target.file, target.file.config.r
    a, b = file.once(_A, lambda: _random(file))
    if _A in target and not (torch.equal(target.tensor(_A), a) and torch.equal(target.tensor(_B), b)):
        target.refuse("has random bases that differ from the file's common ones", "bad_tensor_entry")
    lambdas, gammas = target.tensor(_LAMBDA), target.tensor(_GAMMA)
    smaller, larger = gammas.shape[1], max(target.inputs, target.outputs)
    scaled = (lambdas[:, :, None] * a[:, :, :smaller] * gammas[None]).flatten(0, 1)
    wide = b[:larger, : lambdas.shape[1]].flatten(1)
    found = wide @ scaled if smaller == target.inputs else (wide @ scaled).T
    return dense(found * (file.config.randlora_alpha / rank))


METHODS = (
    Method(
        kind="randlora",
        peft_type="RANDLORA",
        config=RandLoraConfig,
        served="native",
        note="A dense delta as large as the weight; the random bases are saved or drawn again from the seed.",
        source="arXiv 2502.00987",
        parts=frozenset({_LAMBDA, _GAMMA, _A, _B}),  # PEFT repeats the common bases for each module
        shapes=_shapes,
        forms=_forms,
        common_parts=frozenset({_A, _B}),
        common=_common,
        check=_check,
    ),
)

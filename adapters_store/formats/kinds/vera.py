"""VeRA (arXiv 2310.11454) and PVeRA (arXiv 2512.07703): two random matrices for all modules, scaled by vectors."""

import torch

from adapters_store.formats.kinds.folding import refuse_bias, refuse_kinds, refuse_seed
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, unsupported
from adapters_store.forms import LowRank


class VeraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True


class PveraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None  # of training's samples


def _check(config: VeraConfig | PveraConfig) -> None:
    refuse_bias(config)
    refuse_seed(config, "projection_prng_key")


def _check_pvera(config: PveraConfig) -> None:
    _check(config)
    if config.sample_at_inference:
        unsupported(["sample_at_inference (answers would be random)"])


def largest(file: AdapterFile) -> tuple[int, int]:
    """Inputs and outputs that cover every module the config selects: the sizes of PEFT's shared matrices."""
    assert file.matcher is not None
    specs = [file.base.modules[name] for name in file.matcher.targeted()]
    sizes = [(spec.in_features, spec.out_features) for spec in specs if spec.kind != "embedding"]
    return max((size[0] for size in sizes), default=0), max((size[1] for size in sizes), default=0)


class _Kind:
    """What differs between the two: names, and that PVeRA holds a mean and a variance, of which the mean acts."""

    def __init__(self, name: str, halves: int) -> None:
        self._name = name
        self._halves = halves
        self.lambda_b, self.lambda_d = f"{name}_lambda_b", f"{name}_lambda_d"
        self._a, self._b = f"{name}_A", f"{name}_B"
        self.common_parts = frozenset({self._a, self._b})

    def shapes(self, target: Target) -> Shapes:
        refuse_kinds(target, "embedding")
        target.bound_rank(target.file.config.r)
        return {self.lambda_b: (target.outputs,), self.lambda_d: (self._halves * target.file.config.r,)}

    def common(self, file: AdapterFile) -> Shapes:
        return self._sizes(file) if file.config.save_projection else {}

    def forms(self, target: Target) -> list[LowRank]:
        """`lambda_b * B (lambda_d * A x)`: lambda_b scales outputs, which makes B one's own."""
        file, rank = target.file, target.file.config.r
        a, b = file.once(self._name, lambda: self._bases(file))
        scaled = b[: target.outputs] * target.tensor(self.lambda_b)[:, None]
        return [LowRank(a[:rank, : target.inputs].contiguous(), scaled, target.tensor(self.lambda_d)[:rank])]

    def _sizes(self, file: AdapterFile) -> dict[str, tuple[int, int]]:
        inputs, outputs = largest(file)
        return {self._a: (self._halves * file.config.r, inputs), self._b: (outputs, file.config.r)}

    def _bases(self, file: AdapterFile) -> tuple[torch.Tensor, torch.Tensor]:
        """As saved, or drawn again as PEFT draws them. The rank is within the limits."""
        if file.config.save_projection:
            return file.tensor(self._a), file.tensor(self._b)
        sizes, generator = self._sizes(file), torch.Generator().manual_seed(file.config.projection_prng_key)
        drawn = [torch.nn.init.kaiming_uniform_(torch.empty(size), generator=generator) for size in sizes.values()]
        return drawn[0], drawn[1]


_VERA, _PVERA = _Kind("vera", 1), _Kind("pvera", 2)

METHODS = (
    Method(
        kind="vera",
        peft_type="VERA",
        config=VeraConfig,
        served="folded",
        note="A LoRA of rank r; the matrices that all modules share are saved or drawn again from the seed.",
        source="arXiv 2310.11454",
        parts=frozenset({_VERA.lambda_b, _VERA.lambda_d}),
        shapes=_VERA.shapes,
        forms=_VERA.forms,
        common_parts=_VERA.common_parts,
        common=_VERA.common,
        check=_check,
    ),
    Method(
        kind="pvera",
        peft_type="PVERA",
        config=PveraConfig,
        served="folded",
        note="As VeRA, with the mean of what it learnt to sample; sampling while serving is refused.",
        source="arXiv 2512.07703",
        parts=frozenset({_PVERA.lambda_b, _PVERA.lambda_d}),
        shapes=_PVERA.shapes,
        forms=_PVERA.forms,
        common_parts=_PVERA.common_parts,
        common=_PVERA.common,
        check=_check_pvera,
    ),
)

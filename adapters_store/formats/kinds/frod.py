"""FRoD (`peft.tuners.frod`): the base's weight as U L V', with L trained, and a sparse S beside it."""

import torch

from adapters_store.formats.kinds.folding import dense, refuse_bias, refuse_kinds
from adapters_store.formats.method import AdapterFile, Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, unsupported
from adapters_store.forms import Form
from adapters_store.safetensors_header import DTYPES, INDICES

_DIAGONAL, _VALUES = "frod_lambda_l", "frod_lambda_s_values"
_COMMON = ("frod_V", "frod_s_indices", "frod_s_size")
_SMALLEST = 1e-12  # `peft.tuners.frod.layer`: a column of U with a lesser norm is zero


class FrodConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2."""

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 0.001
    progressbar: bool = True
    runtime_offload_base_weight: bool = False


def _check(config: FrodConfig) -> None:
    refuse_bias(config)
    if not config.save_projection:
        unsupported(["save_projection false (save it with true: the basis follows from all layers of the base)"])


def category(name: str) -> str:
    """Modules of one role share a basis: `peft.tuners.frod.model._category_from_key`."""
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _common(file: AdapterFile) -> Shapes:
    assert file.matcher is not None
    found: dict[str, tuple[int, ...]] = {}
    for name in file.matcher.targeted():
        basis, indices, size = (f"{part}.{category(name)}" for part in _COMMON)
        inputs = file.base.modules[name].in_features
        shape = file.common[indices].shape if indices in file.common else ()
        found |= {basis: (inputs, inputs), indices: (2, shape[1] if len(shape) == 2 else 0), size: (2,)}
    return found


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding")
    count = target.file.common[f"frod_s_indices.{category(target.name)}"].shape[1]
    return {_DIAGONAL: (target.inputs,), _VALUES: (count,)}


def _forms(target: Target) -> list[Form]:
    """`U (S + L) V' - W`, where U is W V'^-1 with columns of length 1."""
    basis, indices, size = (f"{part}.{category(target.name)}" for part in _COMMON)
    file, inputs = target.file, target.inputs
    places = file.read(file.common[indices])
    if places.is_floating_point() or file.read(file.common[size]).tolist() != [inputs, inputs]:
        target.refuse(f"has {inputs} inputs, and a sparse part of another size or type", "bad_dtype")
    if int(places.min()) < 0 or int(places.max()) >= inputs:
        target.refuse(f"has {inputs} inputs, but its sparse part lies beyond them", "bad_index")
    places = places.long()
    v, weight = file.tensor(basis).double(), target.weight(factored=True).double()
    try:
        u = torch.linalg.solve(v, weight.T).T
    except RuntimeError:  # singular
        u = weight @ torch.linalg.pinv(v, rtol=1e-6).T
    lengths = u.norm(dim=0)
    u = torch.where(lengths > _SMALLEST, u / lengths.clamp(min=_SMALLEST), torch.zeros_like(u))
    core = target.tensor(_DIAGONAL).double().diag()
    core.index_put_((places[0], places[1]), target.tensor(_VALUES).double(), accumulate=True)
    return dense(u @ core @ v.T - weight)


METHODS = (
    Method(
        kind="frod",
        peft_type="FROD",
        config=FrodConfig,
        served="native",
        note="A dense delta, made from the base's weights and the saved basis; a basis that is not saved is refused.",
        source="PEFT's peft.tuners.frod",
        parts=frozenset({_DIAGONAL, _VALUES}),
        shapes=_shapes,
        forms=_forms,
        common_parts=frozenset(_COMMON),
        common=_common,
        check=_check,
        dtypes=DTYPES | INDICES,
    ),
)

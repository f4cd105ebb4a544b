"""SaRA (arXiv 2409.06633): new values for the smallest weights of the base, and for those only."""

import torch

from adapters_store.formats.kinds import outside
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig, bad
from adapters_store.forms import Sparse
from adapters_store.safetensors_header import DTYPES, INDICES

_VALUES, _INDICES = "sara_values", "sara_indices"


class SaraConfig(TunerConfig):
    """threshold: weights of a smaller size were trained; None where the file says which."""

    threshold: float | None = None


def _check(config: SaraConfig) -> None:
    if config.threshold is not None and config.threshold <= 0:
        bad("has a `threshold` that is not positive", "threshold")


def _shapes(target: Target) -> Shapes:
    outside.linear(target)
    shape = target.entries[_VALUES].shape if _VALUES in target else ()
    count = shape[0] if shape else 0
    if target.file.config.threshold is not None:
        return {_VALUES: (count,)}
    return {_VALUES: (count,), _INDICES: (2, count)}


def _forms(target: Target) -> list[Sparse]:
    """`W' - W` at the trained places, which are those of the base's own layout, row by row."""
    weight = target.weight(factored=True)
    own = weight if target.spec.kind == "linear" else weight.T
    if target.file.config.threshold is None:
        rows, columns = target.indices(_INDICES, max(own.shape))
        if int(rows.max()) >= own.shape[0] or int(columns.max()) >= own.shape[1]:
            target.refuse(f"names positions in `{_INDICES}` outside {list(own.shape)}", "bad_index")
    else:
        rows, columns = (own.abs() < target.file.config.threshold).nonzero(as_tuple=True)
    values = target.tensor(_VALUES)
    if len(rows) != len(values):
        target.refuse(f"has {len(rows)} weights below the threshold, but {len(values)} values")
    delta = values - own[rows, columns]
    return [_sparse(target, *((rows, columns) if target.spec.kind == "linear" else (columns, rows)), delta)]


def _sparse(target: Target, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> Sparse:
    places, order = (rows * target.inputs + columns).sort(stable=True)
    if bool((places.diff() == 0).any()):
        target.refuse(f"names a position twice in `{_INDICES}`", "bad_index")
    start = torch.zeros(target.outputs + 1, dtype=torch.int32)
    start[1:] = torch.bincount(rows, minlength=target.outputs).cumsum(0)
    return Sparse(start, columns[order].to(torch.int32), values[order].contiguous())


METHODS = (
    Method(
        kind="sara",
        peft_type="SARA",
        config=SaraConfig,
        served="native",
        note="A sparse delta: the trained values less the base's own.",
        source="arXiv 2409.06633",
        parts=frozenset({_VALUES, _INDICES}),
        dtypes=DTYPES | INDICES,
        shapes=_shapes,
        forms=_forms,
        check=_check,
    ),
)

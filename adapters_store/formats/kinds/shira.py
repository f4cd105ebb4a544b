"""SHiRA (arXiv 2406.13175): few entries of a weight are trained, anywhere in it."""

from adapters_store.formats.kinds.folding import refuse_kinds
from adapters_store.formats.kinds.sparse_rows import compressed
from adapters_store.formats.method import Method, Shapes, Target
from adapters_store.formats.tuner_config import TunerConfig
from adapters_store.forms import Form
from adapters_store.safetensors_header import DTYPES, INDICES

_VALUES, _PLACES = "shira_weight", "shira_indices"


class ShiraConfig(TunerConfig):
    """adapter_config.json of PEFT 0.21.2. The mask is in the file, whoever made it."""

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True


def _shapes(target: Target) -> Shapes:
    refuse_kinds(target, "embedding", "conv1d")
    count = target.rank * (target.inputs + target.outputs)
    if count > target.inputs * target.outputs:
        target.refuse(f"cannot hold {count} trained entries", "bad_config", "r")
    return {_VALUES: (count,), _PLACES: (2, count)}


def _forms(target: Target) -> list[Form]:
    """Rows, then columns, of the entries; whole numbers, though PEFT writes them as float32 on Windows."""
    rows, columns = target.raw(_PLACES).long()
    if bool((rows < 0).any() | (rows >= target.outputs).any() | (columns < 0).any() | (columns >= target.inputs).any()):
        target.refuse("has entries outside the weight", "bad_index")
    return [compressed(rows * target.inputs + columns, target.tensor(_VALUES), target.outputs, target.inputs)]


METHODS = (
    Method(
        kind="shira",
        peft_type="SHIRA",
        config=ShiraConfig,
        served="native",
        note="A sparse delta.",
        source="arXiv 2406.13175",
        parts=frozenset({_VALUES, _PLACES}),
        shapes=_shapes,
        forms=_forms,
        dtypes=DTYPES | INDICES,
    ),
)

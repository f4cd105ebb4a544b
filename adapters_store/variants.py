"""Adapters that hold many: what a request may choose of one (its knobs), and the variant that is served for it.

A manifest declares knobs as `{"rank": {"max": 8}, "gate": {"default": 0.5}, "task": {"count": 4}}`. The engine knows a
variant by a key of its own, `<digest>:rank=4`, so pools, caches and batches keep variants apart as they do adapters.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from adapters_store.errors import KnobRefused

Knobs = Mapping[str, Mapping[str, float]]
NO_KNOBS: Knobs = {}


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the adapters that an adapter holds. None: what it does where nothing is chosen.

    rank: only the first so many ranks (DyLoRA, arXiv 2210.07558), by default all; task: whose mixture of skills (Poly,
    arXiv 2202.13914), by default the first, 0; branch: one of the two between which a gate chooses (PETALface, arXiv
    2412.07771), 0 or 1, by default both at the default gate.
    """

    rank: int | None = None
    task: int | None = None
    branch: int | None = None

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in asdict(self).items() if value is not None)


WHOLE = Variant()


def key_of(digest: str, variant: Variant) -> str:
    """The engine's name of a variant: the digest itself where nothing is chosen."""
    return digest if variant == WHOLE else f"{digest}:{variant}"


def split(key: str) -> tuple[str, Variant]:
    """`key_of` undone. Raises ValueError for what it has not made."""
    digest, colon, told = key.partition(":")
    if not colon:
        return digest, WHOLE
    variant = Variant(**{name: int(value) for name, _, value in (part.partition("=") for part in told.split(","))})
    if key_of(digest, variant) != key:
        raise ValueError(f"no key of a variant: {key!r}")
    return digest, variant


def require(knobs: Knobs, variant: Variant) -> None:
    """Raises KnobRefused unless an adapter with these knobs has this variant."""
    found = {"gate" if name == "branch" else name: value for name, value in asdict(variant).items()}
    chosen(knobs, {name: value for name, value in found.items() if value is not None})


def chosen(knobs: Knobs, values: Mapping[str, float]) -> list[tuple[Variant, float]]:
    """The variants that a request runs, each with the weight of its delta.

    values: what it chooses, by knob; one that chooses the default chooses nothing. A gate a is `a * branch 0 +
    (1 - a) * branch 1`. Raises KnobRefused `knob_unsupported` or `knob_out_of_range`.
    """
    settings: dict[str, float] = {}
    for name, value in values.items():
        if name not in knobs:
            others = " and ".join(f"`{each}`" for each in sorted(knobs))
            has = f"; they may choose {others}" if knobs else ""
            raise KnobRefused(f"This adapter does not let requests choose `{name}`{has}.", param=name)
        low, high, default = _READ[name](knobs[name])
        if not low <= value <= high:
            text = f"`{name}` is {value:g}; this adapter takes {low:g} to {high:g}."
            raise KnobRefused(text, code="knob_out_of_range", param=name)
        if value != default:
            settings[name] = value
    gate = settings.pop("gate", None)
    numbers = {name: int(value) for name, value in settings.items()}
    if gate is None:
        return [(Variant(**numbers), 1.0)]
    branches = ((Variant(**numbers, branch=0), gate), (Variant(**numbers, branch=1), 1 - gate))
    return [(variant, weight) for variant, weight in branches if weight]


# Of a declared knob: its least and greatest value, and the default.
_READ: Mapping[str, Callable[[Mapping[str, float]], tuple[float, float, float]]] = {
    "rank": lambda knob: (1, knob["max"], knob["max"]),
    "task": lambda knob: (0, knob["count"] - 1, 0),
    "gate": lambda knob: (0, 1, knob["default"]),
}

"""The parameters of every merge method: what each knows, with its defaults; what it does not know is refused."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import TypedDict

from adapters_store.errors import AdapterInvalid
from adapters_store.merging.operators import Majority, Operator

Mode = Literal["corrected", "peft_exact"]
MAX_RANK = 2**16
MAX_EXAMPLES = 64
MAX_EXAMPLE = 8192  # characters of a prompt or an answer
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Density = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Parameters(BaseModel):
    """Base of all: no "5" for 5, nothing unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Lego(Parameters):
    """rank: units of the result, by default the largest rank of a source; norm, output_reweighting: as `lego.merged`;
    iterations: Lloyd's rounds at most; starts: of k-means++, of which the best counts."""

    rank: Rank | None = None
    norm: Literal["l2", "inf", "none"] = "inf"
    output_reweighting: bool = True
    iterations: Annotated[int, Field(ge=1, le=1000)] = 50
    starts: Annotated[int, Field(ge=1, le=64)] = 4
    seed: Seed = 0


class Cat(Parameters):
    """The exact sum; its rank is the sum of the sources' ranks."""

    mode: Mode = "corrected"


class Linear(Parameters):
    """rank: of the corrected result, by default the largest of a source; PEFT keeps the rank that all sources have."""

    mode: Mode = "corrected"
    rank: Rank | None = None

    @model_validator(mode="after")
    def _rank_is_ours(self) -> Self:
        if self.mode == "peft_exact" and self.rank is not None:
            raise ValueError("`rank` does not go with the mode `peft_exact`")
        return self


class Svd(Parameters):
    """rank: by default the largest of a source; clamp: the quantile beyond which entries are cut off."""

    mode: Mode = "corrected"
    rank: Rank | None = None
    clamp: Annotated[float, Field(gt=0, le=1)] | None = None


class TaskArithmetic(Parameters):
    """rank: by default the sum of the sources' ranks, which is exact."""

    rank: Rank | None = None


class Pruned(Parameters):
    """density: share of the entries that are kept, those of largest magnitude."""

    mode: Mode = "corrected"
    density: Density = 0.5


class Dropped(Pruned):
    """density: the chance of an entry to be kept; seed: of that chance."""

    seed: Seed = 0


class Ties(Pruned):
    """majority_sign_method: whether a sign is elected by the sum of the values or by their number; density: 0.2 as in
    the paper."""

    density: Density = 0.2
    majority_sign_method: Majority = "total"


class DareTies(Dropped):
    """As `Dropped` and `Ties`."""

    majority_sign_method: Majority = "total"


class PrunedSvd(Pruned):
    """rank: by default the largest of a source; clamp: in the mode `peft_exact` only."""

    rank: Rank | None = None
    clamp: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _clamp_is_peft(self) -> Self:
        if self.mode == "corrected" and self.clamp is not None:
            raise ValueError("`clamp` goes with the mode `peft_exact` only")
        return self


class DroppedSvd(PrunedSvd, Dropped):
    """As both."""


class TiesSvd(PrunedSvd, Ties):
    """As both."""


class DareTiesSvd(PrunedSvd, DareTies):
    """As both."""


class Subspace(Parameters):
    """operator: what merges within the subspace; density, majority_sign_method, seed: its own; rank: of the result, by
    default all that is there."""

    operator: Operator = "ties"
    density: Density = 0.2
    majority_sign_method: Majority = "total"
    rank: Rank | None = None
    seed: Seed = 0


class Truncated(Parameters):
    """rank: of the result; see the method for its default."""

    rank: Rank | None = None


class Example(TypedDict):
    """A labelled example: the answer should follow the prompt."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_EXAMPLE)]
    answer: Annotated[str, Field(min_length=1, max_length=MAX_EXAMPLE)]


class WeightSearch(Parameters):
    """examples: few and labelled, whose loss the weights are to lower; iterations: sets of weights that are tried;
    rank: by default the sum of the sources' ranks, which is exact."""

    examples: Annotated[list[Example], Field(min_length=1, max_length=MAX_EXAMPLES)]
    iterations: Annotated[int, Field(ge=1, le=500)] = 40
    rank: Rank | None = None
    seed: Seed = 0


P = TypeVar("P", bound=Parameters)


def parse(model: type[P], method: str, given: Mapping[str, Any], place: str = "parameters") -> P:
    """A method's parameters. place: the field that holds them.

    Raises AdapterInvalid `unknown_parameter` or `bad_parameter`, which name the field.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"][:1]) or None
    param = f"{place}.{field[:64]}" if field else place
    if first["type"] == "extra_forbidden":
        known = ", ".join(f"`{name}`" for name in model.model_fields)
        text = f"The method `{method}` has no parameter `{(field or '')[:64]}`; it has {known}."
        raise AdapterInvalid(text, code="unknown_parameter", param=param)
    told = first["msg"].removeprefix("Value error, ")
    raise AdapterInvalid(f"`{param}`: {told}.", code="bad_parameter", param=param)

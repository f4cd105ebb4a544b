"""What a request chooses of its adapters besides their names and weights, and what that is to the engine."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters_store import variants
from adapters_store.errors import KnobRefused
from adapters_store.info import AdapterRef
from server.api.schemas.sampling import AdapterParameters
from server.engine.request import WeightedAdapter

Values = Mapping[str, float]  # field of the body, as `adapter_parameters.rank` -> what it says


def values_at(place: str, parameters: AdapterParameters | None) -> Values:
    """place: the field that holds the parameters."""
    given = parameters.model_dump(exclude_none=True) if parameters else {}
    return {f"{place}.{name}": value for name, value in given.items()}


def refuse_for_base(values: Values) -> None:
    """Raises KnobRefused where something is chosen of no adapter at all."""
    for field in values:
        raise KnobRefused(f"`{field}` is for an adapter, and the request names none.", param=field)


@dataclass(frozen=True, slots=True)
class Chosen:
    """One adapter of a request."""

    ref: AdapterRef
    weight: float
    values: Values

    @property
    def told(self) -> str:
        """Name, version and choice."""
        parts = (f";{_knob(field)}={value:g}" for field, value in self.values.items())
        return f"{self.ref.name}@{self.ref.version}" + "".join(parts)

    def adapters(self) -> list[WeightedAdapter]:
        """What the engine is to run: one variant, or two where a gate is chosen. Raises KnobRefused."""
        ref = self.ref
        try:
            found = variants.chosen(ref.knobs, {_knob(field): value for field, value in self.values.items()})
        except KnobRefused as error:
            field = next(field for field in self.values if _knob(field) == error.param)
            raise KnobRefused(error.message, code=error.code, param=field) from None
        return [
            WeightedAdapter(
                variants.key_of(ref.digest, variant), self.weight * share, ref.virtual_tokens, ref.invocation
            )
            for variant, share in found
        ]


def _knob(field: str) -> str:
    return field.rpartition(".")[2]

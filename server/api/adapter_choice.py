"""Which adapter a request means: named in one of many places, resolved once to digests.

`model` must be sent by OpenAI's clients, so the base model's id there says nothing; anywhere else it chooses the base.
`tgi` and `dummy` are what TGI's and Hugging Face's chat clients send as `model` when none is given: they count as the
base model's id unless an adapter has that name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, NamedTuple

from fastapi import Depends, Header, Query, Request

from adapters_store.errors import AdapterNotFound
from adapters_store.info import AdapterRef
from adapters_store.names import PUBLIC
from server.api.context import add_answer_header
from server.api.dependencies import Caller, CallerDep, ServicesDep
from server.api.schemas.refused import refuse_misnamed, refuse_misspelt
from server.api.schemas.sampling import AdapterWeight, ReferenceText
from server.api.services import Services
from server.api.variant_choice import Chosen, Values, refuse_for_base, values_at
from server.engine.request import WeightedAdapter
from server.errors import InvalidRequest

NOTHING: Values = {}
PLACEHOLDER_MODELS = frozenset({"tgi", "dummy"})


@dataclass(frozen=True, slots=True)
class Choice:
    """The adapters of one request, fixed for its whole life. `model` is the name to answer with: the caller's own."""

    model: str
    adapters: tuple[WeightedAdapter, ...]
    fingerprint: str

    @property
    def system_fingerprint(self) -> str:
        """Base and adapters in one short text; equal texts mean equal weights."""
        parts = [_bare(self.fingerprint)[:16], *(_short(adapter) for adapter in self.adapters)]
        return "fp_" + "+".join(parts)


class Place(NamedTuple):
    """One place of a request that names an adapter: query, header or body, and the field there."""

    where: str
    field: str
    value: str


class NotSaid(Enum):
    """A place that is there but names nothing."""

    NOT_SAID = "not said"


NOT_SAID = NotSaid.NOT_SAID


def _short(adapter: WeightedAdapter) -> str:
    weight = "" if adapter.weight == 1.0 else f"*{adapter.weight:g}"
    digest, colon, variant = _bare(adapter.digest).partition(":")
    return digest[:16] + colon + variant + weight


def label_of(ref: AdapterRef) -> str:
    """Its name in metrics, where tenants' adapters of one name must not be taken for each other."""
    return ref.name if ref.tenant == PUBLIC else f"{ref.tenant}/{ref.name}"


def _bare(digest: str) -> str:
    return digest.removeprefix("sha256:")


async def resolve(services: Services, caller: Caller, reference: str, field: str = "model") -> AdapterRef:
    """One adapter. A name that is unknown, malformed or another tenant's gets the same 404, in vLLM's words."""
    await services.replicas.ensure(reference, caller.tenant)
    try:
        return services.adapters.resolve(reference, caller.tenant)
    except AdapterNotFound as error:
        raise AdapterNotFound(error.message, code=error.code, param=field) from None


def is_base(services: Services, reference: str) -> bool:
    info = services.engine.info
    names = (info.model_id, *info.aliases, "base", f"sha256:{_bare(info.fingerprint)}")
    return reference.removesuffix(":") in names  # `base:` is SGLang's


async def named(services: Services, caller: Caller, field: str, value: str) -> AdapterRef | NotSaid | None:
    """What one place says: an adapter, None for the base, or nothing.

    Empty is refused: most likely a variable that was never set, and the base would be the wrong model.
    """
    reference = value.strip()
    if not reference:
        raise InvalidRequest(f"`{field}` is empty. Name an adapter or leave it out.", param=field)
    if is_base(services, reference):
        return NOT_SAID if field == "model" else None
    try:
        return await resolve(services, caller, reference, field)
    except AdapterNotFound:
        if field == "model" and reference in PLACEHOLDER_MODELS:
            return NOT_SAID
        raise


class AdapterChooser:
    """Resolves the names of one request for one caller. `outside`: what query and headers say."""

    def __init__(self, services: Services, caller: Caller, request: Request, outside: Sequence[Place]) -> None:
        self._services = services
        self._caller = caller
        self._request = request
        self._outside = outside

    async def choose(
        self,
        body: Mapping[str, str | None],
        weighted: Sequence[AdapterWeight] | None = None,
        values: Values = NOTHING,
    ) -> Choice:
        """body: field of the body -> what it says; values: what is chosen of the one adapter that is named there."""
        said: list[tuple[Place, AdapterRef | None]] = []
        inside = [Place("body", field, value) for field, value in body.items() if value is not None]
        for place in [*self._outside, *inside]:
            found = await named(self._services, self._caller, place.field, place.value)
            if not isinstance(found, NotSaid):
                said.append((place, found))
        if weighted is not None:
            if said:
                raise _conflict([*(place for place, _ in said), Place("body", "adapters", "")])
            for field in values:
                text = f"`{field}` does not say which of `adapters` it is for. Give each its own `parameters`."
                raise InvalidRequest(text, code="adapter_conflict", param=field)
            return await self._weighted(weighted)
        if len({found.digest if found else None for _, found in said}) > 1:
            raise _conflict([place for place, _ in said])
        if not said or said[0][1] is None:
            refuse_for_base(values)
            base = self._services.engine.info
            self._tell(base.model_id, _bare(base.fingerprint))
            return Choice(base.model_id, (), base.fingerprint)
        place = next((place for place, _ in said if place.field == "model"), said[0][0])
        return self._chosen(place.value.strip(), [Chosen(said[0][1], 1.0, values)])

    async def _weighted(self, weighted: Sequence[AdapterWeight]) -> Choice:
        if not weighted:
            raise InvalidRequest("`adapters` is empty. Name at least one or leave it out.", param="adapters")
        found = []
        for number, each in enumerate(weighted):
            ref = await resolve(self._services, self._caller, each.name, "adapters")
            found.append(Chosen(ref, each.weight, values_at(f"adapters.{number}.parameters", each.parameters)))
        digests = [each.ref.digest for each in found]
        if repeated := {each.ref.name for each in found if digests.count(each.ref.digest) > 1}:
            text = f"Adapter named twice: {', '.join(sorted(repeated))}. Give each once, with its whole weight."
            raise InvalidRequest(text, param="adapters")
        return self._chosen("+".join(each.name for each in weighted), found)

    def _chosen(self, model: str, found: Sequence[Chosen]) -> Choice:
        for each in found:
            self._services.metrics.adapter_used(label_of(each.ref), each.ref.digest)
        alone = len(found) == 1 and found[0].weight == 1.0
        names = (each.told + ("" if alone else f";w={each.weight:g}") for each in found)
        self._tell(", ".join(names), ", ".join(each.ref.digest for each in found))
        adapters = tuple(adapter for each in found for adapter in each.adapters())
        return Choice(model, adapters, self._services.engine.info.fingerprint)

    def _tell(self, adapter: str, digest: str) -> None:
        """What answers. Of one model, of which nothing is chosen, `adapter` and `sha256:` with `digest` refer to it."""
        add_answer_header(self._request, "X-Adapter", adapter)
        add_answer_header(self._request, "X-Adapter-Digest", digest)


def _conflict(places: Sequence[Place]) -> InvalidRequest:
    shown = ", ".join(f"{place.where} `{place.field}`" for place in places)
    text = f"The adapter is named more than once, and the names disagree: {shown}. Name it once."
    return InvalidRequest(text, code="adapter_conflict", param=places[0].field)


async def adapter_chooser(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    adapter: Annotated[list[ReferenceText] | None, Query(description="An adapter, or the base model's id.")] = None,
    x_adapter: Annotated[list[ReferenceText] | None, Header(description="The same as a header.")] = None,
) -> AdapterChooser:
    """Takes the names that stand outside the body."""
    refuse_misnamed(request.query_params, ("adapter",), "`?adapter=`", "?")
    refuse_misspelt(request.query_params, ("adapter",), 0.75, "?")
    query = [Place("query", "adapter", each) for each in adapter or []]
    headers = [Place("header", "X-Adapter", each) for each in x_adapter or []]
    return AdapterChooser(services, caller, request, [*query, *headers])


ChooserDep = Annotated[AdapterChooser, Depends(adapter_chooser)]

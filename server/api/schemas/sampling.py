"""Bounded numbers, and the sampling fields that OpenAI's two generation routes share."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.schemas.refused import UNSUPPORTED, refuse_misnamed, refuse_misspelt, refuse_unsupported

MAX_SEED = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_BIASES = 300  # OpenAI's

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Weight = Annotated[float, Field(allow_inf_nan=False, ge=-100, le=100)]
ReferenceText = Annotated[str, Field(max_length=512)]


class Strict(BaseModel):
    """Base of all request models: no "5" for 5, no 1 for true."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class NamesAdapter(Strict):
    """Base of what may name an adapter: refuses what it does not read and the answer would need (see `refused`).

    right: where the adapter belongs; place: what comes before the names of the fields; likeness: from which on a name
    counts as a misspelt one, high where other servers' harmless fields are to be expected.
    """

    right: ClassVar[str]
    place: ClassVar[str] = ""
    likeness: ClassVar[float] = 0.85
    unsupported: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if isinstance(value, dict):
            refuse_misnamed(value, cls.model_fields, cls.right, cls.place)
            refuse_unsupported(value, cls.model_fields, cls.unsupported)
            refuse_misspelt(value, cls.model_fields, cls.likeness, cls.place)
        return value


def _few_biases(value: Any) -> Any:
    """Before the entries are checked, which pydantic does first: 600,000 took 0.7 s."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError("too_long", "must have at most {limit} entries", {"limit": MAX_BIASES})
    return value


class AdapterParameters(Strict):
    """What the request chooses of its adapter, where `knobs` of `GET /adapters/{name}` has it.

    rank: only the first so many ranks; gate: the share of one of two branches; task: whose mixture.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    rank: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    gate: Annotated[Finite, Field(ge=0, le=1)] | None = None
    task: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None


class AdapterWeight(Strict):
    """One adapter of several, with the weight of its delta, and what is chosen of it."""

    name: ReferenceText
    weight: Weight = 1.0
    parameters: AdapterParameters | None = None


class JsonSchemaSpec(Strict):
    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)

    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's response_format; `schema` (LoRAX) and `value` (Hugging Face) beside `json_object` are read too."""

    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    value: dict[str, Any] | None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAISampling(NamesAdapter):
    """Fields of `/v1/completions` and `/v1/chat/completions` alike.

    Fields not listed are ignored if they cannot change the answer, and refused if they would (see `refused`).
    """

    right = "`model` or `adapter`, or `adapters` for several"
    unsupported = UNSUPPORTED

    model: ReferenceText | None = None
    adapter: ReferenceText | None = None
    adapters: Annotated[list[AdapterWeight], Field(max_length=16)] | None = None
    adapter_parameters: AdapterParameters | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, Weight] | None, Field(max_length=MAX_BIASES), BeforeValidator(_few_biases)] = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    user: str | None = None

"""Bodies of TGI's routes, with LoRAX's additions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.api.schemas.sampling import (
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOPS,
    MAX_TOKENS,
    AdapterWeight,
    Finite,
    NamesAdapter,
    ReferenceText,
    ResponseFormat,
    StopText,
    Strict,
    Weight,
)

FinishName = Literal["length", "eos_token", "stop_sequence"]


class GrammarSpec(Strict):
    """`value` is a JSON schema (as an object or as text) or a regular expression."""

    type: Literal["json", "regex", "json_schema"]
    value: str | dict[str, Any]


class MergedAdapters(Strict):
    """LoRAX's per-request composition. Only `linear`; `density` and `majority_sign_method` say nothing there."""

    ids: Annotated[list[ReferenceText], Field(min_length=1, max_length=16)]
    weights: Annotated[list[Weight], Field(min_length=1, max_length=16)]
    merge_strategy: Annotated[str, Field(max_length=64)] | None = None
    density: Finite | None = None
    majority_sign_method: Annotated[str, Field(max_length=64)] | None = None


class Parameters(NamesAdapter):
    """TGI's, and LoRAX's names (`ignore_eos_token`, `return_k_alternatives`, `response_format`). Others are ignored.

    Greedy unless `do_sample` is true and `temperature` is not 0. `rank`, `gate` and `task`: see `AdapterParameters`.
    """

    right = "`parameters.adapter_id`"
    place = "parameters."
    likeness = 0.75

    adapter_id: ReferenceText | None = None
    rank: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    gate: Annotated[Finite, Field(ge=0, le=1)] | None = None
    task: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    adapter_source: Annotated[str, Field(max_length=64)] | None = None
    merged_adapters: MergedAdapters | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    grammar: GrammarSpec | None = None
    ignore_eos: bool | None = None
    ignore_eos_token: bool | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = None
    response_format: ResponseFormat | None = None
    return_full_text: bool | None = None
    return_k_alternatives: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    truncate: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    typical_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    watermark: bool | None = None


class GenerateRequest(NamesAdapter):
    right = "`adapter` or `parameters.adapter_id`, or `adapters` for several"
    likeness = 0.75

    inputs: Annotated[str, Field(min_length=1, max_length=8 << 20)]
    parameters: Parameters | None = None
    stream: bool | None = None
    adapter: ReferenceText | None = None
    adapters: Annotated[list[AdapterWeight], Field(max_length=16)] | None = None
    model: ReferenceText | None = None


class PrefillToken(BaseModel):
    id: int
    text: str
    logprob: float | None


class AlternativeToken(BaseModel):
    id: int
    text: str
    logprob: float


class OutputToken(BaseModel):
    id: int
    text: str
    logprob: float | None
    special: bool
    alternative_tokens: list[AlternativeToken] | None = None


class StreamDetails(BaseModel):
    """`input_length` is TGI's name for the number of prompt tokens, `prompt_tokens` LoRAX's."""

    finish_reason: FinishName
    generated_tokens: int
    seed: int | None
    input_length: int
    prompt_tokens: int


class SequenceDetails(StreamDetails):
    prefill: list[PrefillToken]
    tokens: list[OutputToken]
    top_tokens: list[list[OutputToken]] | None = None


class BestOfSequence(SequenceDetails):
    generated_text: str


class Details(SequenceDetails):
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateAnswer(BaseModel):
    generated_text: str
    details: Details | None = None


class StreamEvent(BaseModel):
    index: int
    token: OutputToken
    top_tokens: list[OutputToken] | None = None
    generated_text: str | None = None
    details: StreamDetails | None = None

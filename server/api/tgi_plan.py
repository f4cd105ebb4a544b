"""From TGI's body to engine requests, and from answers to TGI's details."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters_store.errors import CodedError
from server.api.adapter_choice import Choice
from server.api.call import Call
from server.api.generation import Answer, Token
from server.api.logprobs import finite, prompt_tokens
from server.api.openai_sampling import MAX_PATTERN_CHARS, response_grammar, schema_grammar, with_seeds
from server.api.schemas.sampling import AdapterWeight
from server.api.schemas.tgi import (
    AlternativeToken,
    BestOfSequence,
    Details,
    FinishName,
    GenerateAnswer,
    GenerateRequest,
    GrammarSpec,
    MergedAdapters,
    OutputToken,
    Parameters,
    PrefillToken,
    SequenceDetails,
    StreamDetails,
)
from server.api.services import Tokenizer
from server.api.variant_choice import Values
from server.engine.request import FinishReason, GenerationRequest, Grammar, SamplingParams
from server.errors import InvalidRequest

DEFAULT_MAX_NEW_TOKENS = 100  # TGI 3's

FINISH_NAMES: dict[FinishReason, FinishName] = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
}


class MergeNotSupported(CodedError):
    """A composition that only a merged adapter can express (422)."""

    status = 422
    code = "bad_merge"


@dataclass(frozen=True, slots=True)
class TgiPlan:
    body: GenerateRequest
    parameters: Parameters
    requests: tuple[GenerationRequest, ...]
    sampled: bool

    def seed(self, index: int) -> int | None:
        """As TGI: told only where chance played a part."""
        return self.requests[index].sampling.seed if self.sampled else None

    @property
    def alternatives(self) -> int:
        return self.parameters.top_n_tokens or self.parameters.return_k_alternatives or 0


def weighted_adapters(body: GenerateRequest) -> list[AdapterWeight] | None:
    """`adapters`, or LoRAX's merged_adapters, which means the same when linear."""
    merged = body.parameters.merged_adapters if body.parameters else None
    if merged is None:
        return body.adapters
    if body.adapters is not None:
        text = "`adapters` and `parameters.merged_adapters` are both given; give one."
        raise InvalidRequest(text, code="adapter_conflict", param="parameters.merged_adapters")
    return _linear(merged)


def chosen_values(body: GenerateRequest) -> Values:
    """What `parameters` choose of the adapter."""
    given = body.parameters.model_dump(include={"rank", "gate", "task"}, exclude_none=True) if body.parameters else {}
    return {f"parameters.{name}": value for name, value in given.items()}


def _linear(merged: MergedAdapters) -> list[AdapterWeight]:
    if merged.merge_strategy not in (None, "linear"):
        text = "Only merge_strategy `linear` can be computed per request. Others need an adapter made by POST /merge."
        raise MergeNotSupported(text, param="parameters.merged_adapters.merge_strategy")
    if len(merged.ids) != len(merged.weights):
        text = f"merged_adapters has {len(merged.ids)} ids and {len(merged.weights)} weights."
        raise MergeNotSupported(text, param="parameters.merged_adapters.weights")
    return [AdapterWeight(name=name, weight=w) for name, w in zip(merged.ids, merged.weights, strict=True)]


def plan_tgi(body: GenerateRequest, choice: Choice, call: Call, *, stream: bool) -> TgiPlan:
    parameters = body.parameters or Parameters()
    sampled = bool(parameters.do_sample) and parameters.temperature != 0
    best_of = parameters.best_of or 1
    _check(parameters, best_of, sampled=sampled, stream=stream)
    sampling = _sampling(parameters, sampled=sampled)
    requests = tuple(
        GenerationRequest(f"{call.id}-{i}", body.inputs, own, choice.adapters, call.caller.tenant)
        for i, own in enumerate(with_seeds(sampling, parameters.seed, best_of))
    )
    return TgiPlan(body, parameters, requests, sampled)


def _check(parameters: Parameters, best_of: int, *, sampled: bool, stream: bool) -> None:
    if best_of > 1 and not sampled:
        raise InvalidRequest("You must use sampling (do_sample) when best_of is > 1.", param="best_of")
    if best_of > 1 and parameters.seed is not None:
        raise InvalidRequest("seed must not be set when best_of is > 1.", param="seed")
    if best_of > 1 and stream:
        raise InvalidRequest("best_of > 1 cannot be streamed.", param="best_of")
    if stream and parameters.decoder_input_details:
        raise InvalidRequest("decoder_input_details cannot be streamed.", param="decoder_input_details")
    if parameters.watermark:
        text = "Watermarking is not supported. Leave `watermark` out or false."
        raise InvalidRequest(text, code="unsupported_parameter", param="watermark")


def _sampling(parameters: Parameters, *, sampled: bool) -> SamplingParams:
    top = parameters.top_n_tokens or parameters.return_k_alternatives or 0
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    return SamplingParams(
        max_tokens=parameters.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        temperature=temperature if sampled else 0.0,
        top_k=parameters.top_k or 0,
        top_p=parameters.top_p or 1.0,
        typical_p=parameters.typical_p or 1.0,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
        stop=tuple(parameters.stop or ()),
        ignore_eos=bool(parameters.ignore_eos or parameters.ignore_eos_token),
        include_stop=True,  # TGI keeps the stop sequence in the text
        logprobs=top,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
        truncate=parameters.truncate,
        grammar=_grammar(parameters.grammar) or response_grammar(parameters.response_format),
    )


def _grammar(spec: GrammarSpec | None) -> Grammar | None:
    if spec is None:
        return None
    if spec.type == "regex":
        if not isinstance(spec.value, str) or not 0 < len(spec.value) <= MAX_PATTERN_CHARS:
            text = f"A regex grammar is a text of 1 to {MAX_PATTERN_CHARS} characters."
            raise InvalidRequest(text, code="invalid_schema", param="parameters.grammar.value")
        return Grammar("regex", spec.value)
    schema = spec.value
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            schema = ""
    if spec.type == "json_schema" and isinstance(schema, dict):
        schema = schema.get("schema", schema)  # TGI 3 wraps it as {name, schema}
    if not isinstance(schema, dict):
        text = "A json grammar is a JSON schema: an object, or its text."
        raise InvalidRequest(text, code="invalid_schema", param="parameters.grammar.value")
    return schema_grammar(schema, "parameters.grammar.value")


class TgiWriter:
    """Answers in TGI's shape."""

    def __init__(self, plan: TgiPlan, tokenizer: Tokenizer) -> None:
        self._plan = plan
        self._tokenizer = tokenizer

    def whole(self, answers: Sequence[Answer]) -> GenerateAnswer:
        """The likeliest answer; the others of `best_of` go into its details."""
        order = sorted(range(len(answers)), key=lambda index: -answers[index].mean_logprob)
        first = order[0]
        text = self.full_text(answers[first])
        if not (self._plan.parameters.details or self._plan.parameters.decoder_input_details):
            return GenerateAnswer(generated_text=text)
        others = [
            BestOfSequence(**self._details(i, answers[i]), generated_text=self.full_text(answers[i])) for i in order[1:]
        ]
        details = Details(**self._details(first, answers[first]), best_of_sequences=others or None)
        return GenerateAnswer(generated_text=text, details=details)

    def full_text(self, answer: Answer) -> str:
        return (self._plan.body.inputs if self._plan.parameters.return_full_text else "") + answer.text

    def stream_details(self, index: int, answer: Answer) -> StreamDetails:
        length = len(answer.prompt.token_ids) if answer.prompt else 0
        return StreamDetails(
            finish_reason=FINISH_NAMES.get(answer.finish_reason or FinishReason.STOP, "stop_sequence"),
            generated_tokens=len(answer.tokens),
            seed=self._plan.seed(index),
            input_length=length,
            prompt_tokens=length,
        )

    def _details(self, index: int, answer: Answer) -> dict[str, Any]:
        prefill = []
        if self._plan.parameters.decoder_input_details and answer.prompt:
            prefill = [self._prefill(token) for token in prompt_tokens(answer.prompt)]
        details = SequenceDetails(
            **self.stream_details(index, answer).model_dump(),
            prefill=prefill,
            tokens=[self.token(token) for token in answer.tokens],
            top_tokens=[self.top(token) or [] for token in answer.tokens] if self._plan.alternatives else None,
        )
        return dict(details)

    def _prefill(self, token: Token) -> PrefillToken:
        logprob = None if token.logprob is None else finite(token.logprob)
        return PrefillToken(id=token.id, text=self._tokenizer.token_text(token.id), logprob=logprob)

    def token(self, token: Token) -> OutputToken:
        alternatives = None
        if self._plan.parameters.return_k_alternatives:
            alternatives = [
                AlternativeToken(id=other.id, text=other.text, logprob=finite(other.logprob))
                for other in self.top(token) or []
            ]
        return self._output(token.id, token.logprob, alternatives)

    def top(self, token: Token) -> list[OutputToken] | None:
        if not self._plan.alternatives:
            return None
        return [self._output(candidate.token_id, candidate.logprob) for candidate in token.top]

    def _output(
        self, token_id: int, logprob: float | None, alternatives: list[AlternativeToken] | None = None
    ) -> OutputToken:
        return OutputToken(
            id=token_id,
            text=self._tokenizer.token_text(token_id),
            logprob=finite(logprob),
            special=self._tokenizer.is_special(token_id),
            alternative_tokens=alternatives,
        )

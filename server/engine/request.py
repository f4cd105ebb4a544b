"""What a caller asks of the engine and what comes back: plain values, no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from adapters_store.errors import CodedError

# Begins the digest of an adapter that is only measured: nobody outside can do anything with such a digest.
TRIAL = "trial-"


def named(digest: str) -> str:
    """An adapter in the text of an error."""
    return "The adapter on trial" if digest.startswith(TRIAL) else f"Adapter sha256:{digest}"


class FinishReason(StrEnum):
    """Why a request ended."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the answer: `kind` is json_schema, regex or lark; `source` its text (for JSON schema, JSON)."""

    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; 0 (or 1.0) switches a filter off.

    max_tokens: None means to the end of the context. seed: None means random. logprobs: None is off, 0 the
    chosen token only, k the k best beside it; prompt_logprobs the same for the prompt's tokens. stop: strings that end
    the answer wherever they appear, across token borders too. truncate: keep the last n prompt tokens.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter by digest, and the weight of its delta in this request.

    digest: or key of a variant (`adapters_store.variants`); virtual_tokens: how many it puts before the prompt;
    invocation: token ids from whose last occurrence in the prompt on it acts, or () for everywhere.
    """

    digest: str
    weight: float = 1.0
    virtual_tokens: int = 0
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, one answer. `prompt` is text (special tokens added by the tokenizer's rule) or token ids as they are.

    add_special_tokens: false for text that a chat template has already completed. probe: is called on the engine's
    thread with each position of the prompt and its logits (a float32 tensor [vocabulary] that is not the caller's to
    keep), again after a preemption; it must not fail. hidden_probe: likewise with how many tokens have been generated
    and what the last decoder layer, before the final norm, gives at the last position ([hidden size], of the model's
    dtype), once for each token that is then chosen; what is computed again after a failure is shown again.
    traced: the last output is to have the request's timeline.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    adapters: tuple[WeightedAdapter, ...] = ()
    tenant: str = "public"
    add_special_tokens: bool = True
    probe: Callable[[int, Any], None] | None = None
    hidden_probe: Callable[[int, Any], None] | None = None
    traced: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token with its log probability (natural log, of the model's raw distribution)."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PromptOutput:
    """Facts of the prompt, sent once, before the first token.

    logprobs: one per prompt token, None for the first (empty unless asked for); top: alternatives alike.
    """

    token_ids: tuple[int, ...]
    cached_tokens: int = 0
    logprobs: tuple[float | None, ...] = ()
    top: tuple[tuple[Candidate, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a request came, its first step began, its first token was there, it ended: monotonic seconds, 0 for never.

    loads: of the adapters that it waited for: digest, and when the load was begun and had its place in device memory.
    """

    added: float
    begun: float
    answered: float
    ended: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    loads: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gave one request.

    token_id: None when the event carries no token (prompt facts, abort, error); text: new text that is certain not to
    be part of a stop string or of an unfinished UTF-8 character; logprob and top: as asked for. The last event of a
    request has a finish_reason; `stop_reason` is the string or token id that ended it; `error` when that is ERROR;
    `timeline` if the request is traced.
    """

    token_id: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()
    prompt: PromptOutput | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: CodedError | None = None
    timeline: Timeline | None = None

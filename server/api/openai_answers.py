"""Pieces that both of OpenAI's routes build their answers from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from server.api.generation import Answer
from server.api.schemas.openai_answers import FinishText, PromptTokensDetails, Usage
from server.api.schemas.sampling import OpenAISampling
from server.engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class Head:
    """What every piece of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def finish_text(answer: Answer) -> FinishText | None:
    if answer.finish_reason is None:
        return None
    return "length" if answer.finish_reason is FinishReason.LENGTH else "stop"


def usage(answers: Sequence[Answer], per_prompt: int) -> Usage:
    """`answers` in the order of prompts, `per_prompt` of each: a prompt is counted once."""
    prompts = [answer.prompt for answer in answers[::per_prompt] if answer.prompt is not None]
    prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    completion_tokens = sum(len(answer.tokens) for answer in answers)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(prompt.cached_tokens for prompt in prompts)),
    )


class StreamUsage:
    """When to say how many tokens there were: at the end, in every piece, or never."""

    def __init__(self, body: OpenAISampling, answers: Sequence[Answer], per_prompt: int) -> None:
        options = body.stream_options
        self.at_end = bool(options and options.include_usage)
        self._always = bool(options and options.continuous_usage_stats)
        self._answers = answers
        self._per_prompt = per_prompt

    def now(self) -> Usage | None:
        return self.total() if self._always else None

    def total(self) -> Usage:
        return usage(self._answers, self._per_prompt)

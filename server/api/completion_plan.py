"""From the body of `/v1/completions` to engine requests, and from answers back to choices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.api.adapter_choice import Choice
from server.api.call import Call
from server.api.generation import Answer, Token, now
from server.api.logprobs import completion_logprobs, prompt_tokens, shown_length
from server.api.openai_answers import Head, finish_text
from server.api.openai_sampling import check_tokens, sampling_params, with_seeds
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.openai_answers import CompletionChoice, CompletionLogprobs
from server.api.services import Tokenizer
from server.engine.request import GenerationRequest
from server.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """`per_prompt` requests for each prompt, of which `shown` are answered; choice i belongs to prompt i // shown."""

    body: CompletionRequest
    head: Head
    prompts: tuple[str | tuple[int, ...], ...]
    requests: tuple[GenerationRequest, ...]
    per_prompt: int
    shown: int

    def best(self, answers: Sequence[Answer]) -> list[Answer]:
        """The likeliest `shown` of each prompt's answers, by log probability per token; if that is all, in order."""
        if self.per_prompt == self.shown:
            return list(answers)
        chosen: list[Answer] = []
        for start in range(0, len(answers), self.per_prompt):
            group = answers[start : start + self.per_prompt]
            chosen += sorted(group, key=lambda answer: -answer.mean_logprob)[: self.shown]
        return chosen


def plan_completion(body: CompletionRequest, choice: Choice, call: Call) -> CompletionPlan:
    vocabulary = call.engine.info.vocabulary
    shown = body.n or 1
    per_prompt = body.best_of or shown
    _check(body, shown, per_prompt)
    prompts = _prompts(body, vocabulary)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = sampling_params(body, vocabulary=vocabulary, max_tokens=max_tokens)
    logprobs = body.logprobs if body.logprobs is not None or per_prompt == shown else 0
    prompt_logprobs = body.logprobs if body.echo else None
    sampling = replace(sampling, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    special = body.add_special_tokens is not False
    # The same seeds for every prompt: a prompt's answer does not depend on its place in the list.
    seeded = with_seeds(sampling, body.seed, per_prompt)
    requests = tuple(
        GenerationRequest(f"{call.id}-{i * per_prompt + j}", prompt, own, choice.adapters, call.caller.tenant, special)
        for i, prompt in enumerate(prompts)
        for j, own in enumerate(seeded)
    )
    head = Head(f"cmpl-{call.id}", now(), choice.model, choice.system_fingerprint)
    return CompletionPlan(body, head, prompts, requests, per_prompt, shown)


def _check(body: CompletionRequest, shown: int, per_prompt: int) -> None:
    if per_prompt < shown:
        raise InvalidRequest(f"best_of ({per_prompt}) is less than n ({shown}).", param="best_of")
    if body.stream and per_prompt > shown:
        raise InvalidRequest("best_of > n cannot be streamed: all answers must end first.", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true.", param="stream_options")


def _prompts(body: CompletionRequest, vocabulary: int) -> tuple[str | tuple[int, ...], ...]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return (prompt,)
    found: list[str | tuple[int, ...]] = []
    flat: list[int] = []
    for each in prompt:
        if isinstance(each, int):
            flat.append(each)
        else:
            found.append(each if isinstance(each, str) else tuple(check_tokens(each, vocabulary, "prompt")))
    return tuple(found) or (tuple(check_tokens(flat, vocabulary, "prompt")),)


class CompletionWriter:
    """Writes the choices of one plan, whole or piece by piece."""

    def __init__(self, plan: CompletionPlan, tokenizer: Tokenizer) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._offsets = [0] * len(plan.requests)
        self._echoed: set[int] = set()

    def choice(self, index: int, answer: Answer) -> CompletionChoice:
        """A piece of choice `index`; a whole answer is a single piece. `echo` puts the prompt before the first."""
        text, tokens = answer.text, answer.tokens
        if self._plan.body.echo and answer.prompt is not None and index not in self._echoed:
            self._echoed.add(index)
            text = self._prompt_text(index) + text
            if self._plan.body.logprobs is not None:
                tokens = prompt_tokens(answer.prompt) + tokens
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, tokens),
            finish_reason=finish_text(answer),
            stop_reason=answer.stop_reason,
        )

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        if self._plan.body.logprobs is None:
            return None
        found = completion_logprobs(self._tokenizer, tokens, self._offsets[index])
        self._offsets[index] += sum(shown_length(self._tokenizer, token) for token in tokens)
        return found

    def _prompt_text(self, index: int) -> str:
        prompt = self._plan.prompts[index // self._plan.shown]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(list(prompt), skip_special_tokens=True)

"""Body of `/v1/completions`."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from server.api.schemas.sampling import MAX_CHOICES, MAX_LOGPROBS, OpenAISampling, TokenId

MAX_PROMPTS = 256

PromptText = Annotated[str, Field(max_length=8 << 20)]
# How many tokens may be is the engine's to say; the first fault is enough, as each costs microseconds.
TokenPrompt = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _kind(prompt: Any) -> str | None:
    """Which form a prompt has, by its first element: trying all of a union costs seconds on long lists."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list) or not prompt:
        return None
    first = prompt[0]
    if isinstance(first, str):
        return "texts"
    return "token_lists" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Annotated[PromptText, Tag("text")]
    | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[TokenPrompt, Tag("tokens")]
    | Annotated[list[TokenPrompt], Field(min_length=1, max_length=MAX_PROMPTS), Tag("token_lists")],
    Discriminator(
        _kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a text, a list of texts, a list of token ids, or a list of such lists, not empty",
    ),
]


class CompletionRequest(OpenAISampling):
    """As OpenAI and vLLM. `echo` with `logprobs` also scores the prompt, which lm-eval uses."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool | None = None

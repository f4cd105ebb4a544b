"""Whether a prompt and what is asked for fit the model."""

from server.engine.request import SamplingParams
from server.engine.status import EngineInfo
from server.engine.tokenizer import Tokenizer
from server.errors import ContextTooLong, InvalidRequest


def bounded(text: str, truncate: int | None, info: EngineInfo, tokenizer: Tokenizer) -> str:
    """Refuse (or cut, where the caller truncates) text that has too many characters for its tokens to fit."""
    if truncate is not None:
        return text[-truncate * tokenizer.longest_token :] if truncate else ""
    if len(text) > info.max_context * tokenizer.longest_token:
        raise ContextTooLong(
            f"The context is {info.max_context} tokens; a prompt of {len(text)} characters has more. "
            "Shorten it, or pass truncate.",
            param="prompt",
        )
    return text


def room_for(tokens: list[int], params: SamplingParams, virtual: int, info: EngineInfo) -> int:
    """Bounds of the prompt and of every token id; returns how many tokens may be generated.

    virtual: tokens that an adapter puts before the prompt.
    """
    limit, max_tokens = info.max_context, params.max_tokens
    named = (*params.logit_bias, *params.stop_token_ids)
    if any(not 0 <= token < info.vocabulary for token in named):
        raise InvalidRequest(
            f"Token ids in logit_bias and stop_token_ids must be in 0 to {info.vocabulary - 1}.",
            param="logit_bias" if params.logit_bias else "stop_token_ids",
        )
    if not tokens:
        raise InvalidRequest("The prompt is empty: it has no tokens.", param="prompt")
    if min(tokens) < 0 or max(tokens) >= info.vocabulary:
        raise InvalidRequest(f"Prompt token ids must be in 0 to {info.vocabulary - 1}.", param="prompt")
    room = limit - virtual - len(tokens)
    wanted = 1 if max_tokens is None else max_tokens
    if room < wanted:
        asked = f" and {wanted} more were asked for" if wanted else ""
        before = f"the adapter puts {virtual} before the prompt, which has" if virtual else "the prompt has"
        raise ContextTooLong(
            f"The context is {limit} tokens; {before} {len(tokens)}{asked}. Shorten the prompt, "
            "ask for fewer tokens, or pass truncate.",
            param="max_tokens",
        )
    return room if max_tokens is None else max_tokens

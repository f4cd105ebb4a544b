"""Log probabilities in OpenAI's two shapes."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

from server.api.generation import Token
from server.api.schemas.openai_answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from server.api.services import Tokenizer
from server.engine.request import Candidate, PromptOutput

# JSON has no -infinity; a token that the model cannot produce gets this, as in vLLM.
LOWEST = -9999.0


def finite(logprob: float | None) -> float:
    return LOWEST if logprob is None or logprob < LOWEST else logprob


def prompt_tokens(prompt: PromptOutput) -> list[Token]:
    """The prompt's tokens with their scores, as `echo` returns them."""
    blank: tuple[Candidate, ...] = ()
    scores = prompt.logprobs or (None,) * len(prompt.token_ids)
    tops = prompt.top or (blank,) * len(prompt.token_ids)
    return [Token(*entry) for entry in zip(prompt.token_ids, scores, tops, strict=True)]


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], offset: int = 0) -> CompletionLogprobs:
    """`top_logprobs` holds the chosen token too; texts shared by two tokens keep the likelier one.

    offset: where the first token begins in the text, which shows no special tokens.
    """
    texts = [tokenizer.token_text(token.id) for token in tokens]
    ends = accumulate((shown_length(tokenizer, token) for token in tokens), initial=offset)
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[None if token.logprob is None else finite(token.logprob) for token in tokens],
        top_logprobs=[_top(tokenizer, token, text) for token, text in zip(tokens, texts, strict=True)],
        text_offset=list(ends)[:-1],
    )


def shown_length(tokenizer: Tokenizer, token: Token) -> int:
    return 0 if tokenizer.is_special(token.id) else len(tokenizer.token_text(token.id))


def _top(tokenizer: Tokenizer, token: Token, text: str) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    found = {text: finite(token.logprob)}
    for candidate in token.top:
        other = tokenizer.token_text(candidate.token_id)
        found[other] = max(found.get(other, LOWEST), finite(candidate.logprob))
    return found


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token]) -> ChatLogprobs:
    content = []
    for token in tokens:
        tops = [_scored(tokenizer, candidate.token_id, candidate.logprob) for candidate in token.top]
        chosen = _scored(tokenizer, token.id, token.logprob)
        content.append(TokenLogprob(**chosen.model_dump(), top_logprobs=tops))
    return ChatLogprobs(content=content)


def _scored(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> TopLogprob:
    text = tokenizer.token_text(token_id)
    return TopLogprob(token=text, logprob=finite(logprob), bytes=list(text.encode()))

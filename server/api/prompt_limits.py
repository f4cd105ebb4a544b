"""Text that cannot fit the context, refused before it is rendered or tokenised: both hold other requests up."""

from server.engine.status import EngineInfo
from server.errors import ContextTooLong

# English has about 4.5. The engine's own bound is the longest token of the vocabulary, often a run of 100 blanks.
CHARACTERS_PER_TOKEN = 16


def check_characters(count: int, info: EngineInfo, param: str) -> None:
    limit = CHARACTERS_PER_TOKEN * info.max_context
    if count > limit:
        text = f"`{param}` has {count} characters; a context of {info.max_context} tokens allows {limit}. Shorten it."
        raise ContextTooLong(text, param=param)


def check_token_count(count: int, info: EngineInfo, param: str) -> None:
    if count > info.max_context:
        text = f"{count} tokens are more than the context of {info.max_context}. Shorten the text."
        raise ContextTooLong(text, param=param)

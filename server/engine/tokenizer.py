"""Text to tokens and back, through the base model's own tokenizer."""

from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from server.engine.status import TokenizerFacts
from server.errors import InvalidRequest

MAX_CHAT_BYTES = 4 << 20


class Tokenizer:
    """The base model's fast tokenizer and chat template. Thread-safe: nothing here changes after the start."""

    def __init__(self, pretrained: Any) -> None:
        self._pretrained = pretrained
        self.fast: FastTokenizer = pretrained.backend_tokenizer
        self.vocabulary = len(pretrained)
        self.longest_token = max(len(token) for token in self.fast.get_vocab())  # characters
        self._special = frozenset(pretrained.all_special_ids)
        template = pretrained.chat_template
        self.facts = TokenizerFacts(
            type(pretrained).__name__,
            pretrained.bos_token,
            pretrained.eos_token,
            pretrained.pad_token,
            pretrained.unk_token,
            template if isinstance(template, str) else None,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special-token spellings inside the text are read as the template needs them.

        `encode_batch` lets other threads run meanwhile and `encode` does not: 1 MB of text held them up for 1.2 s.
        """
        ids: list[int] = self.fast.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        text: str = self.fast.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """The token on its own; bytes that are no whole character show as U+FFFD."""
        return self.decode([token_id])

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation, by the base model's template (never an adapter's).

        Raises InvalidRequest if there is no template or it refuses the messages.
        """
        if not self._pretrained.chat_template:
            raise InvalidRequest(
                "This base model has no chat template; use /v1/completions.", code="no_chat_template", param="messages"
            )
        try:
            text: str = self._pretrained.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        if len(text) > MAX_CHAT_BYTES:
            raise InvalidRequest(f"The conversation is longer than {MAX_CHAT_BYTES} characters.", param="messages")
        return text

    def stream(self, prompt: list[int]) -> "TextStream":
        return TextStream(self.fast, prompt)


class TextStream:
    """Turns one answer's tokens into text as they come; characters are released whole.

    The last prompt tokens go in first, because some tokenizers drop the space of a text's first token.
    """

    CONTEXT = 6

    def __init__(self, fast: FastTokenizer, prompt: list[int]) -> None:
        self._fast = fast
        context = prompt[-self.CONTEXT :]
        # After U+FFFD the stream would wait for the rest of a character, and then give out the prompt's text as well.
        while context and fast.decode(context).endswith("\ufffd"):
            context.pop()
        self._context = context
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text: str | None = self._stream.step(self._fast, token_id)
        except Exception:  # the library gives up on some invalid byte sequences; start afresh behind them
            text = self.flush()
            self._stream = DecodeStream(ids=[], skip_special_tokens=True)
        if text is None:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """Bytes left over that never became a character, shown as U+FFFD."""
        if not self._pending:
            return ""
        text: str = self._fast.decode(self._pending, skip_special_tokens=True)
        return text

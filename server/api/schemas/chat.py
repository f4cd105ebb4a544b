"""Body of `/v1/chat/completions`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.api.schemas.sampling import MAX_LOGPROBS, MAX_TOKENS, OpenAISampling, Strict
from server.errors import InvalidRequest

MAX_MESSAGES = 1024


UNSUPPORTED_PARTS = {
    "image_url": "images",
    "input_image": "images",
    "image": "images",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "videos",
    "file": "files",
}


class TextPart(Strict):
    """The only kind of content part there is here: no images, no audio."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and (feature := UNSUPPORTED_PARTS.get(kind)):
            text = f"Not supported: {feature} in messages. Send parts of type `text` only."
            raise InvalidRequest(text, code="unsupported_parameter", param="messages")
        return value


class Message(Strict):
    """One turn. `content` may be a list of text parts, which are joined."""

    role: Annotated[str, Field(pattern="^(system|developer|user|assistant|tool|function)$")]
    content: str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: list[Any] | None = None

    @property
    def characters(self) -> int:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or []]
        return sum(map(len, parts))

    def template_value(self) -> dict[str, str]:
        """What the chat template sees: `developer` is OpenAI's newer word for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        value = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return value if self.name is None else {**value, "name": self.name}


# The first fault is enough: each costs microseconds, and a long list may hold nothing else.
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(OpenAISampling):
    """As OpenAI and vLLM, for text."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    add_generation_prompt: bool = True

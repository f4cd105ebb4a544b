"""Bodies of `/v1/models`, `/tokenize`, `/detokenize`, `/tokenizer_info`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.schemas.chat import Messages
from server.api.schemas.sampling import ReferenceText, Strict, TokenId


class ModelCard(BaseModel):
    """As vLLM's. `root` says which content is behind an adapter; `parent` is null for the base model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "polyrank"
    root: str
    parent: str | None
    max_model_len: int
    permission: list[Any] = []


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Strict):
    """vLLM's: either `prompt` or `messages`. Special tokens are added to a prompt, not to a rendered conversation."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: ReferenceText | None = None
    prompt: Annotated[str, Field(max_length=8 << 20)] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TokenizerInfo(BaseModel):
    """vLLM's: what a client needs that writes prompts by itself, as lm-eval does. `chat_template` is Jinja."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int


class DetokenizeRequest(Strict):
    model: ReferenceText | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizeAnswer(BaseModel):
    prompt: str

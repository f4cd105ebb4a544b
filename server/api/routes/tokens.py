"""`POST /tokenize` and `/detokenize`, `GET /tokenizer_info`, in vLLM's shapes."""

import asyncio
from dataclasses import asdict

from fastapi import APIRouter

from server.api.access import GENERATE
from server.api.adapter_choice import named
from server.api.body import JsonRoute
from server.api.dependencies import Caller, CallerDep, ServicesDep
from server.api.openai_sampling import check_tokens
from server.api.prompt_limits import check_characters, check_token_count
from server.api.schemas.errors import JSON_ERRORS, READ_ERRORS
from server.api.schemas.models import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from server.api.services import Services
from server.errors import InvalidRequest

router = APIRouter(route_class=JsonRoute, tags=["tokens"], dependencies=[GENERATE])


async def _check_model(services: Services, caller: Caller, model: str | None) -> None:
    """No adapter changes the tokens, so only a name that does not exist is wrong."""
    if model is not None:
        await named(services, caller, "model", model)


@router.post("/tokenize", responses=JSON_ERRORS)
async def tokenize(body: TokenizeRequest, services: ServicesDep, caller: CallerDep) -> TokenizeAnswer:
    """Token ids of a prompt, or of a conversation as the chat template writes it."""
    await _check_model(services, caller, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either `prompt` or `messages`.", param="prompt")
    info = services.engine.info
    check_characters(len(body.prompt or ""), info, "prompt")
    check_characters(sum(message.characters for message in body.messages or []), info, "messages")
    tokens, texts = await asyncio.to_thread(_tokenize, services, body)
    return TokenizeAnswer(count=len(tokens), max_model_len=info.max_context, tokens=tokens, token_strs=texts)


def _tokenize(services: Services, body: TokenizeRequest) -> tuple[list[int], list[str] | None]:
    tokenizer = services.engine.tokenizer
    if body.messages is not None:
        messages = [message.template_value() for message in body.messages]
        text = tokenizer.render_chat(messages, body.add_generation_prompt)
        tokens = tokenizer.encode(text, bool(body.add_special_tokens))
    else:
        tokens = tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
    if not body.return_token_strs:
        return tokens, None
    check_token_count(len(tokens), services.engine.info, "return_token_strs")
    return tokens, [tokenizer.token_text(token) for token in tokens]


@router.post("/detokenize", responses=JSON_ERRORS)
async def detokenize(body: DetokenizeRequest, services: ServicesDep, caller: CallerDep) -> DetokenizeAnswer:
    """The text of token ids."""
    await _check_model(services, caller, body.model)
    check_token_count(len(body.tokens), services.engine.info, "tokens")
    tokens = check_tokens(body.tokens, services.engine.info.vocabulary, "tokens")
    return DetokenizeAnswer(prompt=await asyncio.to_thread(services.engine.tokenizer.decode, tokens))


@router.get("/tokenizer_info", responses=READ_ERRORS)
async def tokenizer_info(services: ServicesDep) -> TokenizerInfo:
    """Special tokens and chat template of the base model, by which lm-eval knows that it can tokenize here."""
    engine = services.engine
    return TokenizerInfo(**asdict(engine.tokenizer.facts), model_max_length=engine.info.max_context)

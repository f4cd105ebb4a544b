"""`POST /v1/chat/completions`."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from fastapi import APIRouter, Response

from server.api.access import GENERATE
from server.api.adapter_choice import Choice
from server.api.body import JsonRoute
from server.api.call import Call, CallDep
from server.api.errors import openai_body
from server.api.generation import Answer, Generations, generate, now, open_generations
from server.api.logprobs import chat_logprobs
from server.api.openai_answers import Head, StreamUsage, finish_text, usage
from server.api.openai_sampling import sampling_params, with_seeds
from server.api.prompt_limits import check_characters
from server.api.schemas.chat import ChatRequest
from server.api.schemas.errors import EVENT_STREAM, GENERATION_ERRORS
from server.api.schemas.openai_answers import AnswerMessage, ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, Delta
from server.api.services import Tokenizer
from server.api.sse import DONE, EventStream, event
from server.api.variant_choice import values_at
from server.engine.request import GenerationRequest
from server.errors import InvalidRequest

router = APIRouter(route_class=JsonRoute, tags=["generate"], dependencies=[GENERATE])


@dataclass(frozen=True, slots=True)
class ChatPlan:
    body: ChatRequest
    head: Head
    requests: tuple[GenerationRequest, ...]


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: EVENT_STREAM, **GENERATION_ERRORS})
async def create_chat_completion(body: ChatRequest, call: CallDep) -> ChatCompletion | Response:
    """Answer a conversation. With `stream` the answer is server-sent events, ended by `[DONE]`."""
    _check(body)
    named = {"model": body.model, "adapter": body.adapter}
    choice = await call.adapters.choose(named, body.adapters, values_at("adapter_parameters", body.adapter_parameters))
    plan = await _plan(body, choice, call)
    tokenizer = call.engine.tokenizer
    if body.stream:
        opened = await open_generations(call, plan.requests, "chat")
        return EventStream(_pieces(plan, opened, tokenizer), opened.aclose, openai_body)
    answers = await generate(call, plan.requests, "chat")
    choices = [_choice(index, answer, plan, tokenizer) for index, answer in enumerate(answers)]
    return ChatCompletion(**plan.head.fields(), choices=choices, usage=usage(answers, len(answers)))


async def _plan(body: ChatRequest, choice: Choice, call: Call) -> ChatPlan:
    # Before the template, which may take a while on long conversations.
    call.engine.check_capacity(body.n or 1, call.caller.tenant, choice.adapters)
    check_characters(sum(message.characters for message in body.messages), call.engine.info, "messages")
    messages = [message.template_value() for message in body.messages]
    prompt = await asyncio.to_thread(call.engine.tokenizer.render_chat, messages, body.add_generation_prompt)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    sampling = sampling_params(body, vocabulary=call.engine.info.vocabulary, max_tokens=max_tokens)
    sampling = replace(sampling, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    seeded = with_seeds(sampling, body.seed, body.n or 1)
    requests = tuple(
        GenerationRequest(f"{call.id}-{i}", prompt, own, choice.adapters, call.caller.tenant, add_special_tokens=False)
        for i, own in enumerate(seeded)
    )
    return ChatPlan(body, Head(f"chatcmpl-{call.id}", now(), choice.model, choice.system_fingerprint), requests)


def _check(body: ChatRequest) -> None:
    if any(message.tool_calls for message in body.messages):
        text = "Not supported: tool calling. Leave `tool_calls` out."
        raise InvalidRequest(text, code="unsupported_parameter", param="messages")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequest("max_tokens and max_completion_tokens differ; give one.", param="max_completion_tokens")


def _choice(index: int, answer: Answer, plan: ChatPlan, tokenizer: Tokenizer) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=AnswerMessage(content=answer.text),
        logprobs=chat_logprobs(tokenizer, answer.tokens) if plan.body.logprobs else None,
        finish_reason=finish_text(answer) or "stop",
        stop_reason=answer.stop_reason,
    )


async def _pieces(plan: ChatPlan, opened: Generations, tokenizer: Tokenizer) -> AsyncGenerator[bytes]:
    answers = [Answer() for _ in plan.requests]
    counts = StreamUsage(plan.body, answers, len(answers))
    head = plan.head.fields()
    for index in range(len(answers)):
        first = ChunkChoice(index=index, delta=Delta(role="assistant", content=""))
        yield event(ChatChunk(**head, choices=[first], usage=counts.now()))
    async for index, output in opened.outputs():
        answers[index].add(output)
        piece = Answer()
        piece.add(output)
        scored = bool(plan.body.logprobs and piece.tokens)
        if not (output.text or piece.finish_reason or scored):
            continue
        choice = ChunkChoice(
            index=index,
            delta=Delta(content=output.text) if output.text or scored else Delta(),
            logprobs=chat_logprobs(tokenizer, piece.tokens) if scored else None,
            finish_reason=finish_text(piece),
            stop_reason=piece.stop_reason,
        )
        yield event(ChatChunk(**head, choices=[choice], usage=counts.now()))
    if counts.at_end:
        yield event(ChatChunk(**head, choices=[], usage=counts.total()))
    yield DONE

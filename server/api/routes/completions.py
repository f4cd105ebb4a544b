"""`POST /v1/completions`."""

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Response

from server.api.access import GENERATE
from server.api.body import JsonRoute
from server.api.call import CallDep
from server.api.completion_plan import CompletionPlan, CompletionWriter, plan_completion
from server.api.errors import openai_body
from server.api.generation import Answer, Generations, generate, open_generations
from server.api.openai_answers import StreamUsage, usage
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.errors import EVENT_STREAM, GENERATION_ERRORS
from server.api.schemas.openai_answers import Completion
from server.api.services import Tokenizer
from server.api.sse import DONE, EventStream, event
from server.api.variant_choice import values_at

router = APIRouter(route_class=JsonRoute, tags=["generate"], dependencies=[GENERATE])


@router.post("/v1/completions", response_model=Completion, responses={200: EVENT_STREAM, **GENERATION_ERRORS})
async def create_completion(body: CompletionRequest, call: CallDep) -> Completion | Response:
    """Continue one prompt or many. With `stream` the answer is server-sent events, ended by `[DONE]`."""
    named = {"model": body.model, "adapter": body.adapter}
    choice = await call.adapters.choose(named, body.adapters, values_at("adapter_parameters", body.adapter_parameters))
    plan = plan_completion(body, choice, call)
    tokenizer = call.engine.tokenizer
    if body.stream:
        opened = await open_generations(call, plan.requests, "completions")
        return EventStream(_pieces(plan, opened, tokenizer), opened.aclose, openai_body)
    answers = await generate(call, plan.requests, "completions")
    writer = CompletionWriter(plan, tokenizer)
    choices = [writer.choice(index, answer) for index, answer in enumerate(plan.best(answers))]
    return Completion(**plan.head.fields(), choices=choices, usage=usage(answers, plan.per_prompt))


async def _pieces(plan: CompletionPlan, opened: Generations, tokenizer: Tokenizer) -> AsyncGenerator[bytes]:
    writer = CompletionWriter(plan, tokenizer)
    answers = [Answer() for _ in plan.requests]
    counts = StreamUsage(plan.body, answers, plan.per_prompt)
    head = plan.head.fields()
    async for index, output in opened.outputs():
        piece = Answer()
        piece.add(output)
        answers[index].add(output)
        choice = writer.choice(index, piece)
        if choice.text or choice.finish_reason or (choice.logprobs and choice.logprobs.tokens):
            yield event(Completion(**head, choices=[choice], usage=counts.now()))
    if counts.at_end:
        yield event(Completion(**head, choices=[], usage=counts.total()))
    yield DONE

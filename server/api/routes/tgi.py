"""TGI's routes: `/generate`, `/generate_stream`, and the root, which its clients call."""

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Response

from server.api import generation
from server.api.access import GENERATE
from server.api.body import JsonRoute
from server.api.call import Call, CallDep
from server.api.errors import tgi_body
from server.api.generation import Answer, Generations, Token
from server.api.schemas.errors import EVENT_STREAM, TGI_ERRORS
from server.api.schemas.tgi import GenerateAnswer, GenerateRequest, StreamEvent
from server.api.services import Tokenizer
from server.api.sse import EventStream, event
from server.api.tgi_plan import TgiPlan, TgiWriter, chosen_values, plan_tgi, weighted_adapters

router = APIRouter(route_class=JsonRoute, tags=["generate"], dependencies=[GENERATE])


@router.post("/generate", response_model=GenerateAnswer, responses={200: EVENT_STREAM, **TGI_ERRORS})
async def generate(body: GenerateRequest, call: CallDep) -> GenerateAnswer | Response:
    """Continue a prompt. `?adapter=` (or any other place for the name) chooses the adapter."""
    return await (_stream(body, call) if body.stream else _whole(body, call))


@router.post("/generate_stream", response_class=Response, responses={200: EVENT_STREAM, **TGI_ERRORS})
async def generate_stream(body: GenerateRequest, call: CallDep) -> Response:
    """The same as server-sent events, one per token."""
    return await _stream(body, call)


@router.post("/", response_model=list[GenerateAnswer], responses={200: EVENT_STREAM, **TGI_ERRORS})
async def generate_compat(body: GenerateRequest, call: CallDep) -> list[GenerateAnswer] | Response:
    """As `/generate`, in a list: the shape that TGI's, LoRAX's and Hugging Face's clients expect here."""
    return await _stream(body, call) if body.stream else [await _whole(body, call)]


async def _plan(body: GenerateRequest, call: Call, *, stream: bool) -> TgiPlan:
    adapter_id = body.parameters.adapter_id if body.parameters else None
    named = {"parameters.adapter_id": adapter_id, "adapter": body.adapter, "model": body.model}
    choice = await call.adapters.choose(named, weighted_adapters(body), chosen_values(body))
    return plan_tgi(body, choice, call, stream=stream)


async def _whole(body: GenerateRequest, call: Call) -> GenerateAnswer:
    plan = await _plan(body, call, stream=False)
    answers = await generation.generate(call, plan.requests, "generate")
    return TgiWriter(plan, call.engine.tokenizer).whole(answers)


async def _stream(body: GenerateRequest, call: Call) -> Response:
    plan = await _plan(body, call, stream=True)
    opened = await generation.open_generations(call, plan.requests, "generate")
    return EventStream(_events(plan, opened, call.engine.tokenizer), opened.aclose, tgi_body)


async def _events(plan: TgiPlan, opened: Generations, tokenizer: Tokenizer) -> AsyncGenerator[bytes]:
    """One event per token, with the text that this token completed: the events' texts join to the answer."""
    writer, answer = TgiWriter(plan, tokenizer), Answer()
    async for _, output in opened.outputs():
        answer.add(output)
        if output.token_id is None and output.finish_reason is None:
            continue
        # An ending without a token of its own is told on the last token, marked special so that nobody counts it.
        last = answer.tokens[-1] if answer.tokens else Token(0, None, ())
        token = writer.token(last)
        token.text, token.special = output.text, token.special or output.token_id is None
        said = StreamEvent(index=len(answer.tokens), token=token, top_tokens=writer.top(last))
        if output.finish_reason is not None:
            said.generated_text = writer.full_text(answer)
            said.details = writer.stream_details(0, answer)
        yield event(said)

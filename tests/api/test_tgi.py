"""TGI's routes."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.engine.request import FinishReason, GenerationRequest, Grammar, SamplingParams, StepOutput
from server.errors import ContextTooLong, EngineFailure, InvalidRequest, ModelOutputInvalid, NotReady, Overloaded
from tests.api.events import events, tgi_error
from tests.api.fake_engine import BOS, EOS, FIRST_BYTE, FakeEngine, logprob_of

Client = httpx.AsyncClient


async def generate(client: Client, inputs: str = "héllo", path: str = "/generate", **parameters: Any) -> dict[str, Any]:
    answer = await client.post(path, json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_plain(client: Client, engine: FakeEngine) -> None:
    assert await generate(client) == {"generated_text": "héllo", "details": None}
    assert engine.last.sampling.max_tokens == 100
    assert engine.last.sampling.temperature == 0


async def test_the_root_answers_in_a_list(client: Client) -> None:
    answer = await client.post("/", json={"inputs": "hi"})
    assert answer.json() == [{"generated_text": "hi", "details": None}]


async def test_details(client: Client) -> None:
    body = await generate(client, "ab", details=True, decoder_input_details=True, top_n_tokens=2, max_new_tokens=5)
    details = body["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == 3
    assert details["prompt_tokens"] == details["input_length"] == 3
    assert details["seed"] is None
    assert details["prefill"] == [
        {"id": BOS, "text": "<s>", "logprob": None},
        {"id": 100, "text": "a", "logprob": logprob_of(100)},
        {"id": 101, "text": "b", "logprob": logprob_of(101)},
    ]
    last = {"id": EOS, "text": "</s>", "logprob": logprob_of(EOS), "special": True, "alternative_tokens": None}
    assert details["tokens"][-1] == last
    assert [len(top) for top in details["top_tokens"]] == [2, 2, 2]
    assert details["best_of_sequences"] is None


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [({"max_new_tokens": 1}, "length"), ({}, "eos_token"), ({"stop": ["l"]}, "stop_sequence")],
)
async def test_finish_reasons(client: Client, parameters: dict[str, Any], reason: str) -> None:
    body = await generate(client, details=True, **parameters)
    assert body["details"]["finish_reason"] == reason


async def test_the_stop_sequence_stays_in_the_text_as_in_tgi(client: Client) -> None:
    assert (await generate(client, "abcdef", stop=["cd"]))["generated_text"] == "abcd"


async def test_full_text(client: Client) -> None:
    assert (await generate(client, "ab", return_full_text=True))["generated_text"] == "abab"


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.7}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0}, 0.0),
    ],
)
async def test_greedy_unless_sampling_is_asked_for(
    client: Client, engine: FakeEngine, parameters: dict[str, Any], temperature: float
) -> None:
    await generate(client, **parameters)
    assert engine.last.sampling.temperature == temperature


async def test_every_parameter_reaches_the_engine(client: Client, engine: FakeEngine) -> None:
    await generate(
        client,
        "abc",
        do_sample=True,
        temperature=0.5,
        frequency_penalty=0.1,
        ignore_eos=True,
        max_new_tokens=9,
        repetition_penalty=1.2,
        seed=4,
        stop=["x"],
        top_k=3,
        top_n_tokens=2,
        top_p=0.9,
        truncate=2,
        typical_p=0.8,
        decoder_input_details=True,
        watermark=False,
        grammar={"type": "regex", "value": "[ab]+"},
        adapter_source="local",
        api_token="never stored",
    )
    assert engine.last.sampling == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        typical_p=0.8,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        seed=4,
        stop=("x",),
        include_stop=True,
        ignore_eos=True,
        logprobs=2,
        prompt_logprobs=0,
        truncate=2,
        grammar=Grammar("regex", "[ab]+"),
    )


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": {"type": "array"}},
        {"type": "json", "value": '{"type": "array"}'},
        {"type": "json_schema", "value": {"name": "n", "schema": {"type": "array"}}},
    ],
)
async def test_json_grammars(client: Client, engine: FakeEngine, grammar: dict[str, Any]) -> None:
    await generate(client, grammar=grammar)
    assert engine.last.sampling.grammar == Grammar("json_schema", '{"type":"array"}')


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 10**30},
        {"temperature": -1},
        {"temperature": 1e308},
        {"top_p": 2},
        {"top_k": -1},
        {"typical_p": 0},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": ["x"] * 17},
        {"stop": "x"},
        {"best_of": 2},
        {"best_of": 2, "do_sample": True, "seed": 1},
        {"best_of": 17, "do_sample": True},
        {"top_n_tokens": 21},
        {"truncate": 0},
        {"watermark": True},
        {"grammar": {"type": "json", "value": "["}},
        {"grammar": {"type": "json", "value": "[" * 20_000}},
        {"grammar": {"type": "regex", "value": ""}},
        {"grammar": {"type": "regex", "value": {}}},
        {"grammar": {"type": "lark", "value": "x"}},
        {"details": "yes"},
    ],
)
async def test_bad_parameters_are_422(client: Client, engine: FakeEngine, parameters: dict[str, Any]) -> None:
    for path in ("/generate", "/generate_stream", "/"):
        tgi_error(await client.post(path, json={"inputs": "hi", "parameters": parameters}), 422, "validation")
    assert not engine.streams


@pytest.mark.parametrize(
    "body", [{}, {"inputs": ""}, {"inputs": None}, {"inputs": ["a"]}, {"inputs": "a", "stream": 1}]
)
async def test_bad_bodies_are_422(client: Client, body: dict[str, Any]) -> None:
    tgi_error(await client.post("/generate", json=body), 422, "validation")


async def test_best_of_returns_the_likeliest_and_tells_the_others(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        place = len(engine.streams)
        prompt = engine.prompt_output(request)
        yield StepOutput(5, f"answer {place}", -1.0 / place, prompt=prompt, finish_reason=FinishReason.EOS)

    engine.script = script
    body = await generate(client, best_of=3, do_sample=True, details=True)
    seeds = [request.sampling.seed for request in engine.requests]
    assert len(set(seeds)) == 3
    others = body["details"]["best_of_sequences"]
    assert {body["details"]["seed"], *(other["seed"] for other in others)} == set(seeds)
    assert len(others) == 2


async def test_a_sampled_answer_tells_its_seed(client: Client, engine: FakeEngine) -> None:
    body = await generate(client, do_sample=True, details=True)
    assert body["details"]["seed"] == engine.last.sampling.seed


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
async def test_streams_of_tokens(client: Client, path: str) -> None:
    answer = await client.post(path, json={"inputs": "é!", "stream": True, "parameters": {"top_n_tokens": 1}})
    found = events(answer.content, done=False)
    assert [event["index"] for event in found] == [1, 2, 3, 4]
    assert "".join(event["token"]["text"] for event in found) == "é!"
    assert [event["token"]["special"] for event in found] == [False, False, False, True]
    assert all(len(event["top_tokens"]) == 1 for event in found)
    assert [event["generated_text"] for event in found] == [None, None, None, "é!"]
    assert found[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 4,
        "seed": None,
        "input_length": 4,
        "prompt_tokens": 4,
    }


@pytest.mark.parametrize("parameters", [{"decoder_input_details": True}, {"best_of": 2, "do_sample": True}])
async def test_what_cannot_be_streamed(client: Client, parameters: dict[str, Any]) -> None:
    body = {"inputs": "a", "parameters": parameters}
    tgi_error(await client.post("/generate_stream", json=body), 422, "validation")


async def test_lorax_names(client: Client, engine: FakeEngine) -> None:
    form = {"type": "json_object", "schema": {"type": "array"}}
    body = await generate(
        client, ignore_eos_token=True, return_k_alternatives=2, details=True, max_new_tokens=2, response_format=form
    )
    assert engine.last.sampling.ignore_eos
    assert engine.last.sampling.grammar == Grammar("json_schema", '{"type":"array"}')
    assert len(body["details"]["tokens"][0]["alternative_tokens"]) == 2


async def test_an_ending_without_a_token_still_ends_the_stream(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(prompt=engine.prompt_output(request))
        yield StepOutput(FIRST_BYTE + 97, "a", -1.0)
        yield StepOutput(text="bc", finish_reason=FinishReason.STOP)

    engine.script = script
    answer = await client.post("/generate_stream", json={"inputs": "x"})
    found = events(answer.content, done=False)
    assert "".join(event["token"]["text"] for event in found) == found[-1]["generated_text"] == "abc"
    assert found[-1]["details"]["generated_tokens"] == 1


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [
        (Overloaded("full"), 429, "overloaded"),
        (NotReady("draining"), 503, "not_ready"),
        (ContextTooLong("long"), 422, "validation"),
        (InvalidRequest("bad schema", code="invalid_schema"), 422, "validation"),
        (EngineFailure("lost"), 424, "generation"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
async def test_refusals(client: Client, engine: FakeEngine, error: Exception, status: int, error_type: str) -> None:
    engine.refuse = error
    answer = await client.post("/generate", json={"inputs": "a"})
    assert "secret" not in tgi_error(answer, status, error_type)
    assert ("retry-after" in answer.headers) == (status in (429, 503))


async def test_failures_of_the_generation(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        if len(engine.streams) > 1:
            yield StepOutput(FIRST_BYTE + 97, "a", -1.0)
        yield StepOutput(finish_reason=FinishReason.ERROR, error=ModelOutputInvalid("NaN logits"))

    engine.script = script
    tgi_error(await client.post("/generate", json={"inputs": "a"}), 424, "generation")
    answer = await client.post("/generate_stream", json={"inputs": "a"})
    assert events(answer.content, done=False)[-1] == {"error": "NaN logits", "error_type": "generation"}


async def test_an_abort_is_an_incomplete_generation(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        yield StepOutput(finish_reason=FinishReason.ABORT)

    engine.script = script
    tgi_error(await client.post("/generate", json={"inputs": "a"}), 503, "incomplete_generation")

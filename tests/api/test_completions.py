"""`POST /v1/completions`."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.engine.request import FinishReason, GenerationRequest, Grammar, SamplingParams, StepOutput
from tests.api.events import events, openai_error
from tests.api.fake_engine import BOS, EOS, FIRST_BYTE, FakeEngine, logprob_of

Client = httpx.AsyncClient
PATH = "/v1/completions"


async def complete(client: Client, **body: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def stream(client: Client, **body: Any) -> list[dict[str, Any]]:
    answer = await client.post(PATH, json={"temperature": 0, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.content)


async def test_one_prompt(client: Client) -> None:
    body = await complete(client, prompt="héllo")
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "héllo", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["usage"]["prompt_tokens"] == 7
    assert body["usage"]["completion_tokens"] == 7
    assert body["usage"]["total_tokens"] == 14


async def test_sixteen_tokens_unless_more_are_asked_for(client: Client, engine: FakeEngine) -> None:
    body = await complete(client, prompt="x" * 40)
    assert body["choices"][0]["text"] == "x" * 16
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([BOS, 97 + FIRST_BYTE], ["a"]),
        ([[97 + FIRST_BYTE], [98 + FIRST_BYTE, 99 + FIRST_BYTE]], ["a", "bc"]),
    ],
)
async def test_every_form_of_prompt(client: Client, prompt: Any, texts: list[str]) -> None:
    body = await complete(client, prompt=prompt)
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))


@pytest.mark.parametrize(
    "prompt", [[], [[]], [True], ["a", 1], [1.5], None, 7, {}, [1, "a"], [-1], [2**40], [259], ["x"] * 257, [[259]]]
)
async def test_bad_prompts(client: Client, engine: FakeEngine, prompt: Any) -> None:
    error = openai_error(await client.post(PATH, json={"prompt": prompt}), 400, "invalid_parameter")
    assert error["param"].startswith("prompt")
    assert not engine.streams


async def test_choices_have_following_seeds_and_indices_by_prompt(client: Client, engine: FakeEngine) -> None:
    body = await complete(client, prompt=["p", "q"], n=3, seed=5, temperature=1)
    assert [choice["text"] for choice in body["choices"]] == ["fp", "gp", "hp", "fq", "gq", "hq"]
    assert [request.sampling.seed for request in engine.requests] == [5, 6, 7, 5, 6, 7]
    assert body["usage"]["prompt_tokens"] == 4
    assert len({request.request_id for request in engine.requests}) == 6


async def test_absent_seeds_are_random(client: Client, engine: FakeEngine) -> None:
    for _ in range(2):
        await complete(client, prompt="a")
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[0] != seeds[1]
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


async def test_negative_seeds_work(client: Client, engine: FakeEngine) -> None:
    await complete(client, prompt="a", seed=-1)
    assert (engine.last.sampling.seed or -1) >= 0


async def test_best_of_returns_the_likeliest(client: Client, engine: FakeEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[StepOutput]:
        seed = request.sampling.seed or 0
        assert request.sampling.logprobs == 0
        prompt = engine.prompt_output(request)
        yield StepOutput(5, f"s{seed}", -abs(seed - 11.0), prompt=prompt, finish_reason=FinishReason.EOS)

    engine.script = script
    body = await complete(client, prompt="a", n=2, best_of=4, seed=10, temperature=1)
    assert [choice["text"] for choice in body["choices"]] == ["s11", "s10"]
    assert [choice["logprobs"] for choice in body["choices"]] == [None, None]
    assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"best_of": 17}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "y" * 1001}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [259]}, "stop_token_ids"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
async def test_values_out_of_bounds(client: Client, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    answer = await client.post(PATH, json={"prompt": "a", **fields})
    error = openai_error(answer, 400, "invalid_parameter")
    assert (error["param"] or "").startswith(param)
    assert not engine.streams


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
async def test_numbers_that_are_none(client: Client, number: str) -> None:
    body = f'{{"prompt": "a", "temperature": {number}}}'
    answer = await client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_json", "invalid_parameter")


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", "x"), ("tools", [{}]), ("guided_json", {}), ("use_beam_search", True), ("length_penalty", 0.5)],
)
async def test_parameters_that_would_change_the_answer_are_refused(client: Client, name: str, value: Any) -> None:
    answer = await client.post(PATH, json={"prompt": "a", name: value or {"a": 1}})
    assert openai_error(answer, 400, "unsupported_parameter")["param"] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", None), ("suffix", ""), ("tools", []), ("tool_choice", "none"), ("length_penalty", 1.0), ("user", "me")],
)
async def test_neutral_values_and_hints_pass(client: Client, name: str, value: Any) -> None:
    await complete(client, prompt="a", **{name: value, "metadata": {"a": 1}, "priority": 3})


async def test_every_parameter_reaches_the_engine(client: Client, engine: FakeEngine) -> None:
    await complete(
        client,
        prompt="abc",
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_k=-1,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=-0.3,
        logit_bias={"5": -100},
        seed=3,
        stop=["x", "yy"],
        stop_token_ids=[7],
        include_stop_str_in_output=True,
        ignore_eos=True,
        logprobs=2,
        truncate_prompt_tokens=2,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}},
    )
    assert engine.last.sampling == SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_k=0,
        top_p=0.9,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=-0.3,
        logit_bias={5: -100.0},
        seed=3,
        stop=("x", "yy"),
        stop_token_ids=(7,),
        include_stop=True,
        ignore_eos=True,
        logprobs=2,
        truncate=2,
        grammar=Grammar("json_schema", '{"type":"array"}'),
    )


async def test_json_object_is_any_object(client: Client, engine: FakeEngine) -> None:
    await complete(client, prompt="a", response_format={"type": "json_object"})
    assert engine.last.sampling.grammar == Grammar("json_schema", '{"type":"object"}')


async def test_a_schema_may_not_be_endless(client: Client) -> None:
    schema = {"enum": ["x" * 70_000]}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    openai_error(await client.post(PATH, json={"prompt": "a", "response_format": form}), 400, "invalid_schema")


async def test_stop_strings_end_the_answer(client: Client) -> None:
    choice = (await complete(client, prompt="abcdef", stop="cd"))["choices"][0]
    assert choice["text"] == "ab"
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "cd"


async def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_reads_it(client: Client) -> None:
    body = await complete(client, prompt=[[BOS, 100, 101], [102, 103]], max_tokens=1, logprobs=1, echo=True)
    first, second = body["choices"]
    assert first["text"] == "aba"
    scores = first["logprobs"]
    assert scores["tokens"] == ["<s>", "a", "b", "a"]
    assert scores["token_logprobs"] == [None, logprob_of(100), logprob_of(101), logprob_of(100)]
    assert scores["top_logprobs"] == [None, {"a": logprob_of(100)}, {"b": logprob_of(101)}, {"a": logprob_of(100)}]
    assert scores["text_offset"] == [0, 0, 1, 2]
    assert second["logprobs"]["token_logprobs"][0] is None
    # lm-eval: the sum over [context length : -1], greedy where each equals the largest of its alternatives.
    assert sum(scores["token_logprobs"][1:-1]) == logprob_of(100) + logprob_of(101)


async def test_echo_with_no_new_tokens(client: Client) -> None:
    choice = (await complete(client, prompt="ab", max_tokens=0, logprobs=1, echo=True))["choices"][0]
    assert choice["text"] == "ab"
    assert len(choice["logprobs"]["tokens"]) == 3
    assert choice["finish_reason"] == "length"


async def test_logprobs_hold_the_chosen_token_and_the_likelier_of_two_with_one_text(
    client: Client, engine: FakeEngine
) -> None:
    choice = (await complete(client, prompt="é", logprobs=3, max_tokens=1))["choices"][0]
    scores = choice["logprobs"]
    assert scores["tokens"] == ["\ufffd"]
    chosen = scores["token_logprobs"][0]
    assert max(scores["top_logprobs"][0].values()) == chosen
    assert choice["text"] == "" or choice["text"] == "\ufffd"


async def test_streamed_pieces_join_to_the_answer(client: Client) -> None:
    whole = await complete(client, prompt="héllo", logprobs=1, echo=True)
    pieces = await stream(client, prompt="héllo", logprobs=1, echo=True)
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for choice in choices for value in choice["logprobs"][field]]
        assert joined == whole["choices"][0]["logprobs"][field]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert len({piece["id"] for piece in pieces}) == 1
    assert all(piece["usage"] is None for piece in pieces)


async def test_streamed_choices_are_told_apart(client: Client) -> None:
    pieces = await stream(client, prompt=["ab", "cd"], n=2, seed=0, temperature=1)
    texts = ["", "", "", ""]
    for piece in pieces:
        texts[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert texts == ["aab", "bab", "acd", "bcd"]


async def test_usage_comes_last_when_asked_for(client: Client) -> None:
    pieces = await stream(client, prompt="ab", stream_options={"include_usage": True})
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["total_tokens"] == 6
    assert all(piece["usage"] is None for piece in pieces[:-1])


async def test_continuous_usage(client: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = await stream(client, prompt="ab", stream_options=options)
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == [1, 2, 3, 3]


async def test_a_request_id_used_twice_is_two_requests_to_the_engine(client: Client, engine: FakeEngine) -> None:
    for _ in range(2):
        answer = await client.post(PATH, json={"prompt": "a"}, headers={"X-Request-Id": "mine-1"})
        assert answer.headers["X-Request-Id"] == "mine-1"
        assert answer.json()["id"].startswith("cmpl-mine-1-")


async def test_special_tokens_are_left_out_on_request(client: Client, engine: FakeEngine) -> None:
    body = await complete(client, prompt="a", add_special_tokens=False)
    assert body["usage"]["prompt_tokens"] == 1


async def test_eos_can_be_ignored(client: Client) -> None:
    body = await complete(client, prompt="ab", ignore_eos=True, max_tokens=5)
    assert body["choices"][0]["text"] == "ababa"
    assert EOS == 0

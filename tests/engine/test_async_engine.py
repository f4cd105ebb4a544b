"""The engine for asyncio over a scripted core: streams, prompts, limits, adapters."""

import asyncio
import threading

import pytest

from server.engine import async_engine
from server.engine.async_engine import LONG_TEXT
from server.engine.request import FinishReason, GenerationRequest, Grammar, SamplingParams, WeightedAdapter
from server.engine.status import Residency
from server.errors import ContextTooLong, InvalidRequest, Overloaded
from tests.engine.fakes import expected_tokens, tokenizer
from tests.engine.front import CONTEXT, HELD_TEXT, PATIENCE, PROMPT, HeldEncode, collect, running, tokens
from tests.support.models import VOCABULARY


def asked(prompt: list[int], *adapters: WeightedAdapter) -> GenerationRequest:
    return GenerationRequest("virtual", tuple(prompt), SamplingParams(max_tokens=1), adapters)


async def test_a_stream_gives_the_tokens_in_order_and_ends() -> None:
    async with running() as own:
        outputs = await own.generate("a", PROMPT, SamplingParams(max_tokens=6))
        assert tokens(outputs) == expected_tokens(PROMPT, 6)
        assert [output.finish_reason for output in outputs] == [None] * 5 + [FinishReason.LENGTH]
        assert "".join(output.text for output in outputs) == tokenizer().decode(tokens(outputs))
        assert outputs[0].prompt is not None
        assert outputs[0].prompt.token_ids == tuple(PROMPT)
        own.assert_idle()


async def test_memory_is_prepared_while_there_is_no_work_and_a_request_ends_that() -> None:
    async with running() as own:
        begun = threading.Event()

        def endless(blocks: int) -> bool:
            assert not own.fake.core.has_work
            begun.set()
            return True

        own.runner.prepare = endless  # type: ignore[method-assign]
        for name in "ab":
            assert tokens(await own.generate(name, PROMPT, SamplingParams(max_tokens=3))) == expected_tokens(PROMPT, 3)
            begun.clear()
            assert await asyncio.to_thread(begun.wait, PATIENCE)


async def test_the_engine_sleeps_once_all_memory_is_prepared() -> None:
    async with running() as own:
        left = 5
        done = threading.Event()

        def prepare(blocks: int) -> bool:
            nonlocal left
            assert left > 0, "asked again after it was done"
            left -= 1
            if not left:
                done.set()
            return left > 0

        own.runner.prepare = prepare  # type: ignore[method-assign]
        await own.settle()
        assert await asyncio.to_thread(done.wait, PATIENCE)
        own.assert_idle()


async def test_an_ended_stream_stays_ended() -> None:
    async with running() as own:
        stream = await own.submit("a")
        await collect(stream)
        assert await collect(stream) == []
        await stream.aclose()
        await stream.aclose()
        own.assert_idle()


async def test_many_streams_at_once_under_pressure() -> None:
    """More requests than run, fewer blocks and adapter pages than wanted; each gets what it would get alone."""
    async with running(blocks=10, pages=3, max_running=6, budget=9) as own:

        async def one(index: int) -> None:
            adapters = [("x", 1.0), ("y", 0.5), ("z", 1.0), ("w", 2.0)][index % 5 : index % 5 + index % 3]
            prompt = [20 + index % 7, *PROMPT, *range(30, 30 + index % 9)]
            params = SamplingParams(max_tokens=3 + index % 11)
            outputs = await own.generate(str(index), prompt, params, adapters)
            assert tokens(outputs) == expected_tokens(prompt, 3 + index % 11, adapters)
            assert outputs[-1].finish_reason is FinishReason.LENGTH

        await asyncio.gather(*(one(index) for index in range(50)))
        assert own.engine.stats().preemptions_total + own.engine.stats().adapter_evictions_total > 0
        await own.settle()
        own.assert_idle()


async def test_the_engine_rests_and_wakes_again() -> None:
    async with running() as own:
        for index in range(5):
            await own.generate(str(index))
        steps = own.engine.stats().steps_total
        assert steps == 5 * 4, "one step per token, none while there is nothing to do"


class TestPrompts:
    async def test_text_is_tokenised(self) -> None:
        async with running() as own:
            for index, text in enumerate(("hello", "日本語")):
                outputs = await own.generate(str(index), text)
                assert outputs[0].prompt is not None
                assert list(outputs[0].prompt.token_ids) == tokenizer().encode(text)

    async def test_long_text_is_tokenised_off_the_loop_and_truncated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with running() as own:
            threads: list[threading.Thread] = []
            encode = own.engine.tokenizer.encode

            def watched(text: str, special: bool) -> list[int]:
                threads.append(threading.current_thread())
                return encode(text, special)

            monkeypatch.setattr(own.engine.tokenizer, "encode", watched)
            monkeypatch.setattr(async_engine, "LONG_TEXT", 20)
            text = "the question " * LONG_TEXT
            outputs = await own.generate("long", text, SamplingParams(max_tokens=1, truncate=9))
            await own.generate("short", "x", SamplingParams(max_tokens=1))
            assert outputs[0].prompt is not None
            assert list(outputs[0].prompt.token_ids) == encode(text)[-9:]
            assert threads[0] is not threading.current_thread()
            assert threads[1] is threading.current_thread()

    async def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tokenising 8 MB takes seconds."""
        async with running() as own:
            monkeypatch.setattr(own.engine.tokenizer, "encode", lambda *_: pytest.fail("tokenised"))
            with pytest.raises(ContextTooLong, match="characters"):
                await own.submit("a", "x" * (CONTEXT * own.engine.tokenizer.longest_token + 1))
            own.assert_idle()

    @pytest.mark.parametrize("prompt", ["", ()], ids=["text", "ids"])
    async def test_an_empty_prompt_is_refused(self, prompt: str | tuple[int, ...]) -> None:
        async with running() as own:
            with pytest.raises(InvalidRequest, match="empty"):
                await own.submit("a", prompt)
            own.assert_idle()

    @pytest.mark.parametrize("bad", [-1, VOCABULARY, 1 << 62, 1 << 80])
    async def test_token_ids_beyond_the_vocabulary_are_refused(self, bad: int) -> None:
        async with running() as own:
            with pytest.raises(InvalidRequest, match=str(VOCABULARY - 1)):
                await own.submit("a", [5, bad, 6])
            own.assert_idle()
            assert tokens(await own.generate("a", [5, VOCABULARY - 1, 6])) == expected_tokens([5, VOCABULARY - 1, 6], 4)

    @pytest.mark.parametrize(("length", "max_tokens"), [(CONTEXT + 1, 0), (CONTEXT, 1), (CONTEXT, None), (1, CONTEXT)])
    async def test_what_does_not_fit_the_context_is_refused(self, length: int, max_tokens: int | None) -> None:
        async with running() as own:
            with pytest.raises(ContextTooLong) as caught:
                await own.submit("a", [5] * length, SamplingParams(max_tokens=max_tokens))
            assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
            assert str(CONTEXT) in caught.value.message
            own.assert_idle()

    @pytest.mark.parametrize(("asked", "said"), [(0, None), (None, "1 more"), (3, "3 more")])
    async def test_no_token_is_said_to_be_asked_for_that_was_not(self, asked: int | None, said: str | None) -> None:
        async with running() as own:
            with pytest.raises(ContextTooLong) as caught:
                await own.submit("a", [5] * (CONTEXT + 1), SamplingParams(max_tokens=asked))
            assert (said or "has 65.") in caught.value.message
            assert ("more" in caught.value.message) == (said is not None)

    async def test_what_just_fits_the_context_is_served(self) -> None:
        async with running() as own:
            for index, (length, asked, given) in enumerate(
                [(CONTEXT, 0, 0), (CONTEXT - 1, None, 1), (CONTEXT - 9, None, 9), (1, CONTEXT - 1, CONTEXT - 1)]
            ):
                outputs = await own.generate(str(index), [index + 5] * length, SamplingParams(max_tokens=asked))
                assert len(tokens(outputs)) == given
                assert outputs[-1].finish_reason is FinishReason.LENGTH
            own.assert_idle()

    async def test_virtual_tokens_count_against_the_context(self) -> None:
        adapter = WeightedAdapter("x", virtual_tokens=8)
        async with running() as own:
            with pytest.raises(ContextTooLong, match="puts 8 before the prompt"):
                await own.engine.submit(asked([5] * (CONTEXT - 8), adapter))
            own.assert_idle()
            outputs = await collect(await own.engine.submit(asked([5] * (CONTEXT - 9), adapter)))
            assert len(tokens(outputs)) == 1
            assert outputs[0].prompt is not None
            assert outputs[0].prompt.token_ids == (5,) * (CONTEXT - 9)
            own.assert_idle()

    async def test_virtual_tokens_beside_another_adapter_are_refused(self) -> None:
        async with running() as own:
            with pytest.raises(InvalidRequest) as caught:
                await own.engine.submit(asked(PROMPT, WeightedAdapter("x", virtual_tokens=8), WeightedAdapter("y")))
            assert caught.value.code == "context_composed"
            own.assert_idle()

    async def test_a_bad_grammar_leaves_nothing(self) -> None:
        async with running() as own:
            with pytest.raises(InvalidRequest) as caught:
                await own.submit("a", PROMPT, SamplingParams(grammar=Grammar("regex", "(")))
            assert caught.value.code == "invalid_schema"
            own.assert_idle()

    async def test_an_id_in_use_is_refused_and_free_again_at_the_end(self) -> None:
        async with running() as own:
            own.runner.close_gate()
            stream = await own.submit("a")
            with pytest.raises(InvalidRequest) as caught:
                await own.submit("a")
            assert caught.value.code == "duplicate_request_id"
            own.runner.open_gate()
            assert len(await collect(stream)) == 4
            assert len(await own.generate("a")) == 4
            own.assert_idle()

    async def test_stop_strings_and_text_arrive(self) -> None:
        async with running() as own:
            whole = "".join(output.text for output in await own.generate("a", "q", SamplingParams(max_tokens=20)))
            stop = whole[5:8]
            outputs = await own.generate("b", "q", SamplingParams(max_tokens=20, stop=(stop,)))
            assert "".join(output.text for output in outputs) == whole[: whole.index(stop)]
            assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, stop)


class TestCapacity:
    async def test_beyond_the_limit_the_answer_is_immediate(self) -> None:
        async with running(max_running=2, max_queued=1) as own:
            own.runner.close_gate()
            streams = [await own.submit(str(index)) for index in range(3)]
            with pytest.raises(Overloaded) as caught:
                await own.submit("more", "not even tokenised " * LONG_TEXT)
            assert (caught.value.status, caught.value.code) == (503, "overloaded")
            assert caught.value.retry_after
            own.runner.open_gate()
            for stream in streams:
                assert len(await collect(stream)) == 4
            assert len(await own.generate("more")) == 4
            own.assert_idle()

    async def test_several_at_once_are_counted_together(self) -> None:
        async with running(max_running=2, max_queued=1) as own:
            own.engine.check_capacity(3)
            with pytest.raises(InvalidRequest, match="4 requests"):  # it would be told to come back for ever
                own.engine.check_capacity(4)
            own.runner.close_gate()
            stream = await own.submit("a")
            own.engine.check_capacity(2)
            with pytest.raises(Overloaded):
                own.engine.check_capacity(3)
            await stream.aclose()
            own.engine.check_capacity(3)

    async def test_a_refused_request_takes_no_place(self) -> None:
        async with running(max_running=1, max_queued=0) as own:
            for _ in range(5):
                with pytest.raises(InvalidRequest):
                    await own.submit("a", "")
            assert len(await own.generate("a")) == 4

    async def test_requests_still_being_tokenised_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with running(max_running=1, max_queued=0) as own:
            hold = HeldEncode(own, monkeypatch)
            slow = asyncio.create_task(own.submit("a", HELD_TEXT))
            await hold.begun()
            with pytest.raises(Overloaded):
                await own.submit("b")
            hold.go.set()
            await collect(await slow)
            own.assert_idle()


class TestAdapters:
    async def test_warm_pin_and_residency(self) -> None:
        async with running(pages=1) as own:
            assert own.engine.residency("x") is Residency.ABSENT
            await own.engine.pin("x")
            assert tokens(await own.generate("a", adapters=["x"])) == expected_tokens(PROMPT, 4, ["x"])
            assert own.engine.pinned("x")
            assert own.engine.residency("x") is Residency.RESIDENT
            [output] = await own.generate("b", adapters=["y"])
            assert output.error is not None
            assert output.error.code == "adapter_memory_full"
            await own.engine.unpin("x")
            await own.engine.warm("y")
            assert tokens(await own.generate("c", adapters=["y"])) == expected_tokens(PROMPT, 4, ["y"])
            assert not own.engine.pinned("x")
            assert own.engine.residency("x") is Residency.ABSENT

    async def test_a_load_that_ends_wakes_a_resting_engine(self) -> None:
        async with running() as own:
            own.loader.automatic = False
            stream = await own.submit("a", adapters=["x"])
            assert await asyncio.to_thread(own.loader.asked.wait, PATIENCE)
            assert own.engine.residency("x") is Residency.LOADING
            own.loader.end("x")
            own.engine.notify()
            assert tokens(await collect(stream)) == expected_tokens(PROMPT, 4, ["x"])
            assert own.engine.stats().adapter_loads_total == 1

"""The engine's step with a scripted model: failures stay with the request at fault, and the books are right."""

import pytest

from server.engine.grammar import GrammarCompiler
from server.engine.quarantine import FAILURES
from server.engine.request import FinishReason, Grammar, SamplingParams
from tests.engine import fakes
from tests.engine.fakes import Engine, expected_tokens, tokenizer
from tests.engine.support import prompt
from tests.support.models import EOS_ID, VOCABULARY, tiny_tokenizer


def test_tokens_of_a_batch_are_those_of_each_request_alone() -> None:
    engine = Engine(blocks=64, budget=7)
    for index in range(5):
        engine.add(str(index), prompt(3 + index, index), max_tokens=6, adapters=["x"] if index % 2 else [])
    engine.run()
    for index in range(5):
        assert engine.tokens(str(index)) == expected_tokens(
            prompt(3 + index, index), 6, adapters=["x"] if index % 2 else []
        )
        assert engine.reason(str(index)) is FinishReason.LENGTH


def test_preemption_changes_no_token() -> None:
    engine = Engine(blocks=6, budget=16)
    for index in range(4):
        engine.add(str(index), prompt(4, index), max_tokens=16)
    engine.run()
    assert engine.core.stats.preemptions_total > 0
    for index in range(4):
        assert engine.tokens(str(index)) == expected_tokens(prompt(4, index), 16)


class TestFailedStep:
    def test_only_the_request_at_fault_ends(self) -> None:
        engine = Engine(blocks=64)
        for name in ("a", "bad", "c"):
            engine.add(name, prompt(4, ord(name[0])), max_tokens=5)
        engine.step()
        engine.runner.faulty = {"bad"}
        engine.run()
        assert engine.reason("bad") is FinishReason.ERROR
        assert engine.error("bad").status == 500
        assert engine.error("bad").code == "engine_failure"
        assert "RuntimeError" in engine.error("bad").message
        assert "scripted failure" not in engine.error("bad").message, "internals stay inside"
        for name in ("a", "c"):
            assert engine.tokens(name) == expected_tokens(prompt(4, ord(name[0])), 5)

    def test_the_step_is_repeated_one_by_one_only_when_it_fails(self) -> None:
        engine = Engine(blocks=64)
        for name in ("a", "bad", "c"):
            engine.add(name, prompt(4, ord(name[0])), max_tokens=2)
        engine.runner.faulty = {"bad"}
        engine.step()
        assert engine.runner.runs == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]
        engine.step()
        assert engine.runner.runs[4:] == [["a", "c"]]

    def test_in_mid_prefill(self) -> None:
        engine = Engine(budget=6)
        engine.add("bad", prompt(15), max_tokens=2)
        engine.add("good", prompt(3, 5), max_tokens=2)
        engine.step()
        engine.runner.faulty = {"bad"}
        engine.run()
        assert engine.tokens("bad") == []
        assert engine.reason("bad") is FinishReason.ERROR
        assert engine.tokens("good") == expected_tokens(prompt(3, 5), 2)

    def test_what_a_failed_request_computed_is_not_taken_for_a_prefix(self) -> None:
        engine = Engine()
        engine.runner.faulty = {"bad"}
        engine.add("bad", prompt(9))
        engine.run()
        engine.add("again", prompt(9), max_tokens=1)
        engine.run()
        assert engine.core.stats.prefix_hit_tokens_total == 0
        assert engine.tokens("again") == expected_tokens(prompt(9), 1)

    def test_all_at_fault(self) -> None:
        engine = Engine()
        engine.runner.faulty = {"a", "b"}
        engine.add("a", prompt(4))
        engine.add("b", prompt(4, 1))
        engine.run()
        assert engine.reason("a") is engine.reason("b") is FinishReason.ERROR
        engine.add("c", prompt(4, 2), max_tokens=1)
        engine.run()
        assert engine.reason("c") is FinishReason.LENGTH


class TestBrokenGrammar:
    def test_only_its_request_ends_and_not_as_if_it_were_whole(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = Engine(blocks=64)
        compiler = GrammarCompiler(tiny_tokenizer(), VOCABULARY, (EOS_ID,))
        grammar = compiler.compile(Grammar("lark", 'start: "x" dead\ndead: dead'))
        [engine.runner.forced["bad"]] = tokenizer().encode("x")
        engine.add("bad", prompt(4), max_tokens=8, grammar=grammar)
        engine.add("good", prompt(4, 1), max_tokens=5)
        engine.step()
        assert engine.reason("bad") is None
        [engine.runner.forced["bad"]] = [EOS_ID]  # all that the mask of a broken matcher allows
        engine.run()
        assert engine.error("bad").code == "invalid_schema"
        assert engine.tokens("good") == expected_tokens(prompt(4, 1), 5)
        assert engine.runner.runs == [["bad", "good"], ["bad", "good"], ["good"], ["good"], ["good"]], "no step failed"
        [line] = [record for record in caplog.records if record.getMessage() == "request_failed"]
        assert (line.__dict__["request_id"], line.__dict__["code"]) == ("bad", "invalid_schema")
        assert line.exc_info is None


class TestInvalidNumbers:
    def test_that_request_ends_with_its_own_code(self) -> None:
        engine = Engine(blocks=64)
        engine.runner.invalid = {"bad"}
        engine.add("bad", prompt(4), adapters=["x"])
        engine.add("good", prompt(4), max_tokens=3)
        engine.run()
        assert (engine.error("bad").status, engine.error("bad").code) == (500, "model_output_invalid")
        assert engine.tokens("good") == expected_tokens(prompt(4), 3)

    def test_in_mid_answer_the_tokens_before_stand(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4), max_tokens=8)
        engine.step()
        engine.step()
        engine.runner.invalid = {"a"}
        engine.run()
        assert engine.tokens("a") == expected_tokens(prompt(4), 2)
        assert engine.error("a").code == "model_output_invalid"

    def test_an_adapter_is_quarantined_after_three(self) -> None:
        engine = Engine(blocks=64)
        for index in range(FAILURES):
            engine.runner.invalid.add(str(index))
            engine.add(str(index), prompt(4, index), adapters=["x"])
            engine.run()
            assert engine.error(str(index)).code == "model_output_invalid"
        engine.add("late", prompt(4), adapters=["x"])
        assert (engine.error("late").status, engine.error("late").code) == (503, "adapter_quarantined")
        engine.add("both", prompt(4), adapters=["y", "x"])
        assert engine.error("both").code == "adapter_quarantined"
        engine.add("other", prompt(4), adapters=["y"], max_tokens=2)
        engine.add("base", prompt(4), max_tokens=2)
        engine.run()
        assert engine.reason("other") is engine.reason("base") is FinishReason.LENGTH

    def test_a_composition_puts_nobody_in_quarantine(self) -> None:
        """Whoever names a bad adapter beside a good one must not shut the good one out."""
        engine = Engine(blocks=64)
        for index in range(FAILURES + 1):
            engine.runner.invalid.add(str(index))
            engine.add(str(index), prompt(4, index), adapters=["good", "bad"])
            engine.run()
        engine.add("late", prompt(4), adapters=["good"], max_tokens=1)
        engine.run()
        assert engine.reason("late") is FinishReason.LENGTH

    def test_base_requests_quarantine_nothing(self) -> None:
        engine = Engine()
        for index in range(FAILURES + 1):
            engine.runner.invalid.add(str(index))
            engine.add(str(index), prompt(4))
            engine.run()
        engine.add("good", prompt(4), max_tokens=1)
        engine.run()
        assert engine.reason("good") is FinishReason.LENGTH


class TestAnswers:
    def test_no_tokens_asked_for(self) -> None:
        engine = Engine()
        engine.add("a", prompt(9), max_tokens=0)
        engine.run()
        [only] = engine.outputs["a"]
        assert only.finish_reason is FinishReason.LENGTH
        assert only.token_id is None
        assert only.text == ""
        assert only.prompt is not None
        assert only.prompt.token_ids == tuple(prompt(9))
        assert engine.core.stats.generated_tokens_total == 0

    def test_prompt_facts_come_once_with_the_first_token(self) -> None:
        engine = Engine(budget=4)
        engine.add("a", prompt(9), max_tokens=3)
        engine.run()
        assert [output.prompt is not None for output in engine.outputs["a"]] == [True, False, False]

    def test_cached_tokens_are_told(self) -> None:
        engine = Engine()
        for name in ("a", "b"):
            engine.add(name, prompt(9), max_tokens=1)
            engine.run()
        told = [output.prompt.cached_tokens for name in "ab" for output in engine.outputs[name] if output.prompt]
        assert told == [0, 8]

    def test_the_end_of_sequence_token(self) -> None:
        engine = Engine()
        engine.runner.forced = {"a": EOS_ID, "b": EOS_ID}
        engine.add("a", prompt(4), max_tokens=9)
        engine.add("b", prompt(4, 1), max_tokens=2, sampling=SamplingParams(ignore_eos=True))
        engine.run()
        assert (engine.reason("a"), len(engine.tokens("a"))) == (FinishReason.EOS, 1)
        assert (engine.reason("b"), len(engine.tokens("b"))) == (FinishReason.LENGTH, 2)


def test_stats_count() -> None:
    engine = Engine(blocks=8)
    engine.add("a", prompt(9), adapters=["x"], max_tokens=3)
    engine.step()
    assert engine.core.stats.waiting == 1
    assert engine.core.stats.waiting_adapters == ("x",)
    engine.loader.end("x")
    engine.step()
    stats = engine.core.stats
    assert (stats.running, stats.waiting, stats.kv_blocks_free) == (1, 0, 5)
    assert stats.kv_usage == pytest.approx(3 / 8)
    assert stats.running_adapters == ("x",)
    assert stats.adapter_bytes_used == 64
    engine.run()
    engine.core.publish()
    stats = engine.core.stats
    assert (stats.prompt_tokens_total, stats.generated_tokens_total, stats.steps_total) == (9, 3, 3)
    assert (stats.running, stats.waiting, stats.kv_usage, stats.running_adapters) == (0, 0, 0.0, ())
    assert (stats.adapters_resident, stats.adapter_loads_total, stats.adapter_misses_total) == (1, 1, 1)


def test_integrity_finds_an_answer_without_a_sequence() -> None:
    engine = Engine()
    engine.scheduler.waiting.take(engine.add("a", prompt(4)))
    with pytest.raises(AssertionError, match="answers"):
        engine.core.check_integrity()


def test_the_fake_finds_crossed_keys() -> None:
    """The check that other tests lean on must be able to fail: one sequence is given the blocks of another."""
    engine = Engine()
    one = engine.add("a", prompt(6, 1), max_tokens=8)
    two = engine.add("b", prompt(6, 2), max_tokens=8)
    engine.step()
    one.block_table, two.block_table = two.block_table, one.block_table
    with pytest.raises(AssertionError, match="reads"):
        engine.step()


def test_the_fake_finds_a_damaged_adapter() -> None:
    engine = Engine()
    engine.add("a", prompt(6, 1), adapters=["x"], max_tokens=8)
    engine.step()
    engine.loader.end("x")
    engine.step()
    engine.storage.lines |= dict.fromkeys(engine.storage.lines, ("other", 0))
    with pytest.raises(AssertionError, match="damaged"):
        engine.step()


def test_scripted_tokens_depend_on_adapters() -> None:
    assert expected_tokens(prompt(4), 6) != expected_tokens(prompt(4), 6, ["x"])
    assert expected_tokens(prompt(4), 6, ["x"]) != expected_tokens(prompt(4), 6, [("x", 0.5)])
    assert all(not fakes.tokenizer().is_special(token) for token in expected_tokens(prompt(4), 50))

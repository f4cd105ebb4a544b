"""One answer as it grows: text, reasons to end, and what the sampler is told."""

import pytest

from server.engine.answer import Answer
from server.engine.grammar import GrammarCompiler
from server.engine.request import Candidate, FinishReason, Grammar, SamplingParams, StepOutput
from server.engine.sampler import Sampled
from tests.engine.fakes import tokenizer
from tests.engine.support import make_sequence
from tests.support.models import EOS_ID, VOCABULARY, tiny_tokenizer


def make_answer(params: SamplingParams, *, max_tokens: int = 50, prompt: str = "say", grammar: str = "") -> Answer:
    ids = tokenizer().encode(prompt)
    sequence = make_sequence("a", ids, max_tokens=max_tokens, sampling=params)
    state = None
    if grammar:
        compiler = GrammarCompiler(tiny_tokenizer(), VOCABULARY, (EOS_ID,))
        state = compiler.compile(Grammar("regex", grammar))
    return Answer(sequence, tokenizer().stream(ids), seed=5, eos_ids=(EOS_ID,), grammar=state)


def letters(text: str) -> list[int]:
    """One token per letter, however the tokenizer would merge them."""
    return [token for letter in text for token in tokenizer().encode(letter)]


def say(answer: Answer, tokens: list[int]) -> list[StepOutput]:
    """Give tokens until the answer ends."""
    outputs: list[StepOutput] = []
    for token in tokens:
        outputs.append(answer.accept(Sampled(token)))
        if outputs[-1].finish_reason is not None:
            break
    return outputs


def text(outputs: list[StepOutput]) -> str:
    return "".join(output.text for output in outputs)


def test_each_token_gives_its_text() -> None:
    answer = make_answer(SamplingParams())
    outputs = say(answer, letters("abc"))
    assert [output.text for output in outputs] == ["a", "b", "c"]
    assert [output.token_id for output in outputs] == letters("abc")
    assert all(output.finish_reason is None for output in outputs)
    assert answer.sequence.output == letters("abc")


def test_logprobs_are_passed_on() -> None:
    top = (Candidate(3, -0.5),)
    output = make_answer(SamplingParams()).accept(Sampled(9, -1.5, top))
    assert (output.logprob, output.top) == (-1.5, top)


def test_a_row_without_a_token_is_no_output() -> None:
    answer = make_answer(SamplingParams())
    with pytest.raises(ValueError, match="failed"):
        answer.accept(Sampled(None))
    assert answer.sequence.output == []


class TestEnds:
    def test_length(self) -> None:
        outputs = say(make_answer(SamplingParams(), max_tokens=2), letters("abc"))
        assert text(outputs) == "ab"
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.LENGTH, None)

    def test_end_of_sequence_has_no_text(self) -> None:
        outputs = say(make_answer(SamplingParams()), [*letters("ab"), EOS_ID, *letters("c")])
        assert text(outputs) == "ab"
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.EOS, EOS_ID)
        assert outputs[-1].token_id == EOS_ID

    def test_end_of_sequence_ignored(self) -> None:
        outputs = say(
            make_answer(SamplingParams(ignore_eos=True), max_tokens=4), [*letters("ab"), EOS_ID, *letters("c")]
        )
        assert text(outputs) == "abc"
        assert outputs[-1].finish_reason is FinishReason.LENGTH

    def test_end_of_sequence_as_the_last_token_allowed_is_an_end_of_sequence(self) -> None:
        outputs = say(make_answer(SamplingParams(), max_tokens=1), [EOS_ID])
        assert outputs[-1].finish_reason is FinishReason.EOS

    def test_stop_token(self) -> None:
        [stop] = letters("x")
        outputs = say(make_answer(SamplingParams(stop_token_ids=(stop,))), letters("abxc"))
        assert text(outputs) == "ab"
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, stop)

    def test_stop_string_across_tokens(self) -> None:
        outputs = say(make_answer(SamplingParams(stop=("zz", "\n\n"))), letters("a\nb\n\nc"))
        assert text(outputs) == "a\nb"
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, "\n\n")

    def test_stop_string_kept_on_request(self) -> None:
        outputs = say(make_answer(SamplingParams(stop=("</s>",), include_stop=True)), letters("a</s>b"))
        assert text(outputs) == "a</s>"
        assert outputs[-1].finish_reason is FinishReason.STOP

    def test_held_text_comes_out_at_the_end(self) -> None:
        for tokens, reason in ((letters("a<"), FinishReason.LENGTH), ([*letters("a<")[:2], EOS_ID], FinishReason.EOS)):
            outputs = say(make_answer(SamplingParams(stop=("<end>",)), max_tokens=len(tokens)), tokens)
            assert outputs[1].text == ("<" if reason is FinishReason.LENGTH else "")
            assert text(outputs) == "a<"
            assert outputs[-1].finish_reason is reason

    def test_an_unfinished_character_comes_out_at_the_end(self) -> None:
        tokens = tokenizer().encode("a🙂")[:-1]
        outputs = say(make_answer(SamplingParams(), max_tokens=len(tokens)), tokens)
        assert text(outputs) == tokenizer().decode(tokens)
        outputs = say(make_answer(SamplingParams()), [*tokens, EOS_ID])
        assert text(outputs) == tokenizer().decode(tokens)

    def test_a_stop_string_in_the_last_token_is_a_stop(self) -> None:
        outputs = say(make_answer(SamplingParams(stop=("b",)), max_tokens=2), letters("ab"))
        assert (outputs[-1].finish_reason, text(outputs)) == (FinishReason.STOP, "a")

    def test_a_stop_string_of_replacement_characters_at_the_very_end(self) -> None:
        tokens = tokenizer().encode("a🙂")[:2]
        outputs = say(make_answer(SamplingParams(stop=("\ufffd",)), max_tokens=2), tokens)
        assert (outputs[-1].finish_reason, text(outputs)) == (FinishReason.STOP, "a")


class TestMinTokens:
    def test_ends_are_banned_until_then(self) -> None:
        [stop] = letters("x")
        answer = make_answer(SamplingParams(min_tokens=2, stop_token_ids=(stop,)))
        assert set(answer.sample_row().banned) == {EOS_ID, stop}
        say(answer, letters("a"))
        assert set(answer.sample_row().banned) == {EOS_ID, stop}
        say(answer, letters("b"))
        assert answer.sample_row().banned == ()

    def test_with_end_of_sequence_ignored_only_stop_tokens_are_banned(self) -> None:
        answer = make_answer(SamplingParams(min_tokens=2, stop_token_ids=(9,), ignore_eos=True))
        assert answer.sample_row().banned == (9,)

    def test_an_early_stop_string_is_text_like_any_other(self) -> None:
        outputs = say(make_answer(SamplingParams(min_tokens=4, stop=("b",)), max_tokens=9), letters("abcdefbg"))
        assert text(outputs) == "abcdef"
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, "b")

    def test_a_stop_string_may_complete_the_least_number(self) -> None:
        outputs = say(make_answer(SamplingParams(min_tokens=3, stop=("c",))), letters("abcd"))
        assert (text(outputs), outputs[-1].finish_reason) == ("ab", FinishReason.STOP)


class TestPromptFacts:
    def test_they_are_sent_once(self) -> None:
        answer = make_answer(SamplingParams(), prompt="say it")
        first, second = say(answer, letters("ab"))
        assert first.prompt is not None
        assert first.prompt.token_ids == tuple(tokenizer().encode("say it"))
        assert first.prompt.logprobs == ()
        assert first.prompt.top == ()
        assert second.prompt is None
        assert answer.prompt() is None

    def test_cached_tokens(self) -> None:
        answer = make_answer(SamplingParams())
        answer.sequence.num_cached = 4
        facts = answer.prompt()
        assert facts is not None
        assert facts.cached_tokens == 4

    @pytest.mark.parametrize("length", [1, 2, 5])
    def test_logprobs_are_one_per_prompt_token(self, length: int) -> None:
        answer = make_answer(SamplingParams(prompt_logprobs=1), prompt="x" * length)
        assert answer.sequence.num_prompt == length
        answer.sequence.prompt_logprobs = {p: (-float(p), (Candidate(p, -0.1),)) for p in range(1, length)}
        facts = answer.prompt()
        assert facts is not None
        assert facts.logprobs == (None, *(-float(p) for p in range(1, length)))
        assert facts.top == ((), *((Candidate(p, -0.1),) for p in range(1, length)))


class TestSampleRow:
    def test_what_the_sampler_is_told(self) -> None:
        params = SamplingParams(temperature=0.3)
        answer = make_answer(params, prompt="xy")
        say(answer, letters("ab"))
        told = answer.sample_row()
        assert (told.params, told.seed) == (params, 5)
        assert (told.prompt, told.output) == (tokenizer().encode("xy"), letters("ab"))
        assert (told.banned, told.mask) == ((), None)


class TestGrammars:
    def test_the_mask_follows_the_answer_and_the_end_is_an_end_of_sequence(self) -> None:
        answer = make_answer(SamplingParams(), grammar="abc")
        outputs = []
        for letter in "abc":
            mask = answer.sample_row().mask
            assert mask is not None
            [token] = letters(letter)
            assert int(mask[token // 32]) >> (token % 32) & 1
            outputs += say(answer, [token])
        assert text(outputs) == "abc"
        if outputs[-1].finish_reason is None:
            outputs += say(answer, [EOS_ID])
        assert outputs[-1].finish_reason is FinishReason.EOS

    def test_length_ends_it_too(self) -> None:
        outputs = say(make_answer(SamplingParams(), grammar="a+", max_tokens=3), letters("aaaa"))
        assert (text(outputs), outputs[-1].finish_reason) == ("aaa", FinishReason.LENGTH)

    def test_end_of_sequence_ignored_still_ends_a_grammar(self) -> None:
        outputs = say(make_answer(SamplingParams(ignore_eos=True), grammar="a+"), [*letters("aa"), EOS_ID])
        assert (text(outputs), outputs[-1].finish_reason) == ("aa", FinishReason.EOS)

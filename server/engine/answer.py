"""One answer as it grows: chosen tokens become text, and the reasons to stop are watched."""

from server.engine.grammar import GrammarState
from server.engine.request import FinishReason, PromptOutput, StepOutput
from server.engine.sampler import Sampled, SampleRow
from server.engine.sequence import Sequence
from server.engine.stop import StopWatch
from server.engine.tokenizer import TextStream


class Answer:
    """The output side of a sequence: text, stop strings, grammar and finish reason."""

    def __init__(
        self,
        sequence: Sequence,
        text: TextStream,
        *,
        seed: int,
        eos_ids: tuple[int, ...],
        grammar: GrammarState | None,
    ) -> None:
        params = sequence.request.sampling
        self.sequence = sequence
        self._prompt = sequence.prompt  # a copy of all of it, which each step would make anew
        self._params = params
        self._text = text
        self._seed = seed
        self._grammar = grammar
        self._watch = StopWatch(params.stop, include=params.include_stop)
        self._eos_ids = () if params.ignore_eos else eos_ids
        self._prompt_sent = False

    def sample_row(self) -> SampleRow:
        """What the sampler must know to choose this answer's next token."""
        sequence, params = self.sequence, self._params
        early = sequence.num_output < params.min_tokens
        return SampleRow(
            params,
            self._seed,
            self._prompt,
            sequence.output,
            banned=(*self._eos_ids, *params.stop_token_ids) if early else (),
            mask=self._grammar.mask() if self._grammar else None,
        )

    def accept(self, sampled: Sampled) -> StepOutput:
        """Append a chosen token and say what the caller may see of it. Raises InvalidRequest if the grammar broke."""
        token = sampled.token_id
        if token is None:
            raise ValueError("a row without a token has failed and has no output")
        if self._grammar:  # asked here and not with the mask: there it would fail the step of the whole batch
            self._grammar.check()
        sequence = self.sequence
        sequence.tokens.append(token)
        reason, stop_reason, text = self._judge(token)
        return StepOutput(
            token_id=token,
            text=text,
            logprob=sampled.logprob,
            top=sampled.top,
            prompt=self.prompt(),
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def prompt(self) -> PromptOutput | None:
        """Facts of the prompt, the first time only."""
        if self._prompt_sent:
            return None
        self._prompt_sent = True
        sequence = self.sequence
        known = sequence.prompt_logprobs
        positions = range(sequence.num_virtual + 1, sequence.num_prompt) if sequence.wants_prompt_logprobs else ()
        return PromptOutput(
            token_ids=tuple(self._prompt),
            cached_tokens=max(0, sequence.num_cached - sequence.num_virtual),
            logprobs=(None, *(known[p][0] for p in positions)) if sequence.wants_prompt_logprobs else (),
            top=((), *(known[p][1] for p in positions)) if sequence.wants_prompt_logprobs else (),
        )

    def _judge(self, token: int) -> tuple[FinishReason | None, str | int | None, str]:
        """Finish reason, what caused it, and the text that is certain now."""
        if token in self._eos_ids:
            return FinishReason.EOS, token, self._watch.push(self._text.flush()) + self._watch.flush()
        if token in self._params.stop_token_ids:
            return FinishReason.STOP, token, self._watch.push(self._text.flush()) + self._watch.flush()
        text = self._text.push(token)
        count = self.sequence.num_output
        if count >= self._params.min_tokens:  # stop strings before that are text like any other
            text = self._watch.push(text)
        if (matched := self._watch.matched) is not None:
            return FinishReason.STOP, matched, text
        if self._grammar:
            self._grammar.advance(token)
        full = count >= self.sequence.max_tokens
        if full or (self._grammar and self._grammar.stopped):
            text += self._watch.push(self._text.flush()) + self._watch.flush()
            if (matched := self._watch.matched) is not None:
                return FinishReason.STOP, matched, text
            return (FinishReason.LENGTH if full else FinishReason.EOS), None, text
        return None, None, text

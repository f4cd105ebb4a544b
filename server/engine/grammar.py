"""Answers held to a JSON schema, a regular expression or a Lark grammar, through llguidance."""

import threading
from collections import OrderedDict
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.engine.request import Grammar
from server.errors import GrammarTooComplex, InvalidRequest

MAX_SOURCE_BYTES = 64 << 10
CACHED_GRAMMARS = 64
# Work of one mask, which every request of the batch waits for: about 20 ms. The library's own 200,000 are 120 ms;
# masks of common schemas (dates, e-mails, long strings, \w+) need less than 5,000.
MASK_FUEL = 50_000
_DEAD_END = "NoExtensionBias"  # how llguidance calls a place where no token is allowed and the answer is not whole


class GrammarState:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = torch.empty(1, (vocabulary + 31) // 32, dtype=torch.int32)

    def mask(self) -> torch.Tensor:
        """Tokens allowed next: int32 bits [ceil(vocabulary / 32)]; valid until the next call.

        If the matcher breaks here, the mask allows the end alone; `check` says so.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), self._mask.numel() * 4)
        return self._mask[0]

    def advance(self, token_id: int) -> None:
        """Take the chosen token. Raises InvalidRequest as `check` does, also for a token that was not allowed."""
        if not self._matcher.consume_token(token_id):
            raise _broken(self._matcher)

    def check(self) -> None:
        """Raise InvalidRequest (`grammar_too_complex`, `invalid_schema`) if the matcher has broken.

        A broken matcher calls itself stopped, so half an answer would pass for a whole one.
        """
        if self._matcher.is_error():
            raise _broken(self._matcher)

    @property
    def stopped(self) -> bool:
        """True when the grammar allows nothing more."""
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Compiles grammars, the last few from a cache in memory. Call it off the event loop: schemas can take a while."""

    def __init__(self, pretrained: Any, vocabulary: int, eos_ids: tuple[int, ...]) -> None:
        self._pretrained = pretrained
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def compile(self, grammar: Grammar) -> GrammarState:
        """A fresh state at the grammar's start. Raises InvalidRequest (`invalid_schema`) with the compiler's reason."""
        if len(grammar.source.encode(errors="replace")) > MAX_SOURCE_BYTES:
            raise InvalidRequest(
                f"The grammar is larger than {MAX_SOURCE_BYTES} bytes.", code="invalid_schema", param="grammar"
            )
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compile(grammar)
                self._compiled[grammar] = matcher
                if len(self._compiled) > CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return GrammarState(matcher.deep_copy(), self._vocabulary)

    def _compile(self, grammar: Grammar) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._build_tokenizer()
        try:
            source = {
                "json_schema": LLMatcher.grammar_from_json_schema,
                "regex": LLMatcher.grammar_from_regex,
                "lark": LLMatcher.grammar_from_lark,
            }[grammar.kind](grammar.source)
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LLParserLimits(step_lexer_fuel=MASK_FUEL))
        except (ValueError, KeyError) as error:
            raise InvalidRequest(f"Bad grammar: {error}", code="invalid_schema", param="grammar") from error
        if matcher.is_error():
            raise InvalidRequest(f"Bad grammar: {matcher.get_error()}", code="invalid_schema", param="grammar")
        start = GrammarState(matcher.deep_copy(), self._vocabulary)
        start.mask()  # only the first mask shows that nothing satisfies a grammar
        start.check()
        return matcher

    def _build_tokenizer(self) -> Any:
        fast = self._pretrained.backend_tokenizer
        copy = type(fast).from_str(fast.to_str())
        copy.no_padding()
        copy.no_truncation()
        return LLTokenizer(copy.to_str(), n_vocab=self._vocabulary, eos_token=list(self._eos_ids) or None)


def _broken(matcher: Any) -> InvalidRequest:
    """Why a matcher gave up. Its own message is kept from logs and answers: it quotes the answer so far."""
    if matcher.get_error().startswith(_DEAD_END):
        return InvalidRequest("No text can satisfy the grammar.", code="invalid_schema", param="grammar")
    return GrammarTooComplex(
        "The grammar became too complex to follow in this answer. Simplify it: shorter repetitions, fewer "
        "alternatives that begin alike.",
        param="grammar",
    )

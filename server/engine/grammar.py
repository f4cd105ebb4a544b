"""Answers held to a JSON schema, a regular expression or a Lark grammar, through llguidance."""

import threading
from collections import OrderedDict
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer

from server.engine.request import Grammar
from server.errors import InvalidRequest

MAX_SOURCE_BYTES = 64 << 10
CACHED_GRAMMARS = 64


class GrammarState:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = torch.empty(1, (vocabulary + 31) // 32, dtype=torch.int32)

    def mask(self) -> torch.Tensor:
        """Tokens allowed next: int32 bits [ceil(vocabulary / 32)]; valid until the next call."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), self._mask.numel() * 4)
        return self._mask[0]

    def advance(self, token_id: int) -> None:
        """Take the chosen token."""
        self._matcher.consume_token(token_id)

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
            matcher = LLMatcher(self._tokenizer, source, log_level=0)
        except (ValueError, KeyError) as error:
            raise InvalidRequest(f"Bad grammar: {error}", code="invalid_schema", param="grammar") from error
        if matcher.is_error():
            raise InvalidRequest(f"Bad grammar: {matcher.get_error()}", code="invalid_schema", param="grammar")
        return matcher

    def _build_tokenizer(self) -> Any:
        fast = self._pretrained.backend_tokenizer
        copy = type(fast).from_str(fast.to_str())
        copy.no_padding()
        copy.no_truncation()
        return LLTokenizer(copy.to_str(), n_vocab=self._vocabulary, eos_token=list(self._eos_ids) or None)

"""Grammars: every path that the mask allows is valid, malformed ones are refused, and requests do not share state."""

import json
import random
import re
from collections.abc import Callable

import pytest
import torch

from server.engine.grammar import CACHED_GRAMMARS, MAX_SOURCE_BYTES, GrammarCompiler, GrammarState
from server.engine.request import Grammar
from server.errors import InvalidRequest
from tests.engine.fakes import tokenizer
from tests.support.models import EOS_ID, VOCABULARY, tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ada", "bob"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), VOCABULARY, (EOS_ID,))


def allowed(state: GrammarState) -> list[int]:
    mask = state.mask()
    bits = (mask[:, None] >> torch.arange(32)) & 1
    return [int(token) for token in bits.flatten().nonzero()]


def walk(state: GrammarState, seed: int, longest: int = 200) -> str | None:
    """A random path to the end; None if it gets too long."""
    source, tokens = random.Random(seed), list[int]()
    while not state.stopped:
        choice = allowed(state)
        assert choice, "the grammar has neither ended nor a next token"
        # The end is taken when it is offered half of the time, so that short and long answers occur.
        token = EOS_ID if EOS_ID in choice and source.random() < 0.5 else source.choice(choice)
        if token == EOS_ID:
            break
        state.advance(token)
        tokens.append(token)
        if len(tokens) == longest:
            return None
    return tokenizer().decode(tokens)


def is_schema(text: str) -> bool:
    value = json.loads(text)
    age, tags = value["age"], value.get("tags", [])
    return (
        set(value) <= {"name", "age", "tags"}
        and value["name"] in {"ada", "bob"}
        and isinstance(age, int)
        and 0 <= age <= 99
        and len(tags) <= 2
        and all(isinstance(tag, bool) for tag in tags)
    )


GOOD: list[tuple[Grammar, Callable[[str], bool]]] = [
    (Grammar("json_schema", json.dumps(SCHEMA)), is_schema),
    (Grammar("json_schema", '{"enum": ["yes", "no"]}'), lambda text: json.loads(text) in {"yes", "no"}),
    (Grammar("regex", r"[a-c]{2,4}-\d+"), lambda text: re.fullmatch(r"[a-c]{2,4}-\d+", text) is not None),
    (Grammar("regex", r"(語|日本)+!"), lambda text: re.fullmatch(r"(語|日本)+!", text) is not None),
    (
        Grammar("lark", 'start: "(" start ")" | WORD\nWORD: /[xy]+/'),
        lambda text: re.fullmatch(r"\(*[xy]+\)*", text) is not None and text.count("(") == text.count(")"),
    ),
]


@pytest.mark.parametrize(("grammar", "valid"), GOOD, ids=[f"{g.kind}-{i}" for i, (g, _) in enumerate(GOOD)])
def test_every_random_path_is_valid(compiler: GrammarCompiler, grammar: Grammar, valid: Callable[[str], bool]) -> None:
    ends = [walk(compiler.compile(grammar), seed) for seed in range(25)]
    texts = [text for text in ends if text is not None]
    assert len(texts) >= 10, "too few paths came to an end to judge"
    assert all(valid(text) for text in texts)
    assert len(set(texts)) > 1


def test_a_fixed_text_is_the_only_path_and_then_it_ends(compiler: GrammarCompiler) -> None:
    state = compiler.compile(Grammar("regex", "yes"))
    assert not state.stopped
    assert walk(state, 0) == "yes"
    assert allowed(state) == [EOS_ID]


def test_the_end_is_allowed_only_where_the_answer_is_whole(compiler: GrammarCompiler) -> None:
    state = compiler.compile(Grammar("regex", "a+"))
    assert EOS_ID not in allowed(state)
    [a] = tokenizer().encode("a")
    state.advance(a)
    assert {a, EOS_ID} <= set(allowed(state))
    state.advance(EOS_ID)
    assert state.stopped


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", '{"type": "nope"}'),
        ("json_schema", '{"$ref": "#/definitions/missing"}'),
        ("json_schema", '{"$ref": "http://127.0.0.1:1/schema.json"}'),
        ("json_schema", '{"type": "string", "pattern": "(?=a)b"}'),
        ("json_schema", '{"a":' * 3_000),
        ("regex", "("),
        ("regex", "a{3,1}"),
        ("regex", "(?=a)b"),
        ("regex", "\ud800"),
        ("lark", "nonsense"),
        ("lark", "start: missing"),
        ("lark", ""),
        ("json_schema", '{"$ref": "#"}'),
        ("regex", r"a[^\s\S]"),
        ("lark", "start: start"),
        ("no such kind", "x"),
        ("regex", "x" * (MAX_SOURCE_BYTES + 1)),
        ("regex", "語" * (MAX_SOURCE_BYTES // 3 + 1)),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_malformed_grammars_are_the_callers_error(compiler: GrammarCompiler, kind: str, source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(Grammar(kind, source))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_schema", "grammar")
    assert len(caught.value.message) < 2_000
    good = compiler.compile(Grammar("regex", "yes"))
    assert walk(good, 0) == "yes", "a bad grammar leaves nothing behind"


def test_a_bad_grammar_is_bad_again(compiler: GrammarCompiler) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            compiler.compile(Grammar("regex", "("))


def test_an_empty_text_can_satisfy_a_grammar(compiler: GrammarCompiler) -> None:
    assert allowed(compiler.compile(Grammar("regex", "()"))) == [EOS_ID]


class TestBrokenMatcher:
    """A matcher that breaks says that it has stopped, and its mask allows the end."""

    def test_a_grammar_that_becomes_too_complex(self, compiler: GrammarCompiler) -> None:
        source = "start: (A | B)+\nA: /(.*[a-m].{40}){20}/\nB: /(.*[b-z].{50}){20}/"
        state, letters = compiler.compile(Grammar("lark", source)), random.Random(1)

        def say() -> None:
            for _ in range(300):
                state.mask()
                state.check()
                state.advance(tokenizer().encode(letters.choice("abcdxyz"))[0])

        with pytest.raises(InvalidRequest) as caught:
            say()
        assert caught.value.code == "grammar_too_complex"
        assert "xyz" not in caught.value.message, "nothing of the answer is repeated"
        assert state.stopped

    def test_a_dead_end(self, compiler: GrammarCompiler) -> None:
        state = compiler.compile(Grammar("lark", 'start: "x" dead\ndead: dead'))
        state.advance(tokenizer().encode("x")[0])
        state.check()
        state.mask()
        with pytest.raises(InvalidRequest) as caught:
            state.check()
        assert caught.value.code == "invalid_schema"

    def test_a_token_that_is_not_allowed(self, compiler: GrammarCompiler) -> None:
        state = compiler.compile(Grammar("regex", "abc"))
        with pytest.raises(InvalidRequest):
            state.advance(tokenizer().encode("z")[0])


def test_requests_with_the_same_grammar_do_not_share_their_state(compiler: GrammarCompiler) -> None:
    grammar = Grammar("regex", "ab|cd")
    a, c = tokenizer().encode("a")[0], tokenizer().encode("c")[0]
    one, two = compiler.compile(grammar), compiler.compile(grammar)
    start = allowed(one)
    one.advance(a)
    assert allowed(two) == start
    two.advance(c)
    assert allowed(one) == tokenizer().encode("b")
    assert allowed(two) == tokenizer().encode("d")
    assert allowed(compiler.compile(grammar)) == start


def test_asking_for_the_mask_changes_nothing(compiler: GrammarCompiler) -> None:
    """A step that failed is computed again, so a mask may be asked for twice."""
    state = compiler.compile(Grammar("regex", "[a-z]{3}"))
    assert allowed(state) == allowed(state)


def test_the_same_source_as_another_kind_is_another_grammar(compiler: GrammarCompiler) -> None:
    assert walk(compiler.compile(Grammar("regex", "true")), 0) == "true"
    first = allowed(compiler.compile(Grammar("json_schema", "true")))
    assert len(first) > 3, "any JSON value may begin"


def test_the_cache_is_bounded_and_keeps_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    own = GrammarCompiler(tiny_tokenizer(), VOCABULARY, (EOS_ID,))
    compiled: list[Grammar] = []
    inner = own._compile

    def counted(grammar: Grammar) -> object:
        compiled.append(grammar)
        return inner(grammar)

    monkeypatch.setattr(own, "_compile", counted)
    used = Grammar("regex", "used")
    for index in range(CACHED_GRAMMARS + 10):
        own.compile(Grammar("regex", f"x{index}"))
        own.compile(used)
    assert compiled.count(used) == 1
    assert len(own._compiled) == CACHED_GRAMMARS
    own.compile(Grammar("regex", "x0"))
    assert compiled.count(Grammar("regex", "x0")) == 2


def test_the_mask_covers_a_vocabulary_wider_than_the_tokenizer(compiler: GrammarCompiler) -> None:
    state = compiler.compile(Grammar("regex", "[^q]+"))
    assert state.mask().shape == ((VOCABULARY + 31) // 32,)
    assert max(allowed(state)) < len(tiny_tokenizer())

"""Stop strings in text that arrives in pieces: how the text is cut must never matter."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.engine.stop import StopWatch, _overlap


def feed(pieces: list[str], stops: tuple[str, ...], *, include: bool = False) -> tuple[str, str | None]:
    """All that is released, and the stop string that ended it; pushing ends with the match, as an answer does."""
    watch = StopWatch(stops, include=include)
    released = ""
    for piece in pieces:
        released += watch.push(piece)
        if watch.matched is not None:
            return released, watch.matched
    return released + watch.flush(), None


def expected(text: str, stops: tuple[str, ...], *, include: bool = False) -> tuple[str, str | None]:
    """Read letter by letter: the first stop string to be complete ends the text; the longest, if several are."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def test_text_flows_through_without_stops() -> None:
    watch = StopWatch(())
    assert [watch.push(piece) for piece in ("a", "b", "")] == ["a", "b", ""]
    assert watch.flush() == ""
    assert watch.matched is None


def test_empty_stop_strings_are_ignored() -> None:
    assert feed(["abc"], ("",)) == ("abc", None)
    assert feed(["abc"], ("", "c")) == ("ab", "c")


@pytest.mark.parametrize(
    ("pieces", "stops", "result"),
    [
        (["one\n", "two"], ("\n",), ("one", "\n")),
        (["one\n\n", "two"], ("\n\n",), ("one", "\n\n")),
        (["one\n", "\ntwo"], ("\n\n",), ("one", "\n\n")),
        (["one\n", "two"], ("\n\n",), ("one\ntwo", None)),
        (["a<", "/", "s", "> b"], ("</s>",), ("a", "</s>")),
        (["a<", "/", "x"], ("</s>",), ("a</x", None)),
        (["ababa", "bc"], ("ababc",), ("ab", "ababc")),
        (["aab"], ("ab",), ("a", "ab")),
        (["stop"], ("stop",), ("", "stop")),
        (["x", "END more"], ("more", "END"), ("x", "END")),
        (["日", "本", "語で"], ("本語",), ("日", "本語")),
    ],
)
def test_examples(pieces: list[str], stops: tuple[str, ...], result: tuple[str, str | None]) -> None:
    assert feed(pieces, stops) == result


def test_the_stop_string_itself_is_kept_on_request() -> None:
    assert feed(["one\n", "\ntwo"], ("\n\n",), include=True) == ("one\n\n", "\n\n")
    assert feed(["x", "END more"], ("more", "END"), include=True) == ("xEND", "END")


@pytest.mark.parametrize("include", [False, True])
def test_of_several_the_first_to_be_complete_wins_and_then_the_longest(include: bool) -> None:
    stops = ("abc", "b", "bc")
    for pieces in (["xabc"], ["xa", "bc"], ["xab", "c"], list("xabc")):
        assert feed(pieces, stops, include=include) == expected("xabc", stops, include=include)
    assert feed(["xabc"], ("bc", "abc")) == ("x", "abc")


def test_text_is_released_as_soon_as_it_is_certain() -> None:
    watch = StopWatch(("</s>",))
    assert watch.push("a<") == "a"
    assert watch.push("b</") == "<b"
    assert watch.push("s") == ""
    assert watch.push("</s") == "</s"
    assert watch.push("!") == "</s!"


def test_no_text_is_held_without_need() -> None:
    watch = StopWatch(("xyz",))
    assert watch.push("abcxy abc") == "abcxy abc"
    assert watch.flush() == ""


def test_what_follows_a_match_is_dropped() -> None:
    watch = StopWatch(("b",))
    assert watch.push("abcd") == "a"
    assert watch.flush() == ""


@pytest.mark.parametrize(
    ("text", "stop", "size"),
    [("ab", "bc", 1), ("aba", "abab", 3), ("aaa", "aab", 2), ("x", "x", 0), ("", "x", 0), ("xy", "yx", 1)],
)
def test_overlap(text: str, stop: str, size: int) -> None:
    assert _overlap(text, stop) == size


letters = st.text("ab", max_size=12)
stop_strings = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(letters, st.lists(st.integers(0, 12), max_size=6), stop_strings, st.booleans())
@example("xabc", [3], ("bc", "b", "ab", "abc"), True)
@example("abcde", [4], ("bcd", "abcde"), False)
@example("abc", [2], ("ab", "abc"), True)
def test_cutting_does_not_matter(text: str, places: list[int], stops: tuple[str, ...], include: bool) -> None:
    assert feed(cut(text, places), stops, include=include) == expected(text, stops, include=include)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(letters, st.lists(st.integers(0, 12), max_size=6), stop_strings)
def test_nothing_released_is_ever_taken_back(text: str, places: list[int], stops: tuple[str, ...]) -> None:
    """After each piece what is out is a beginning of the final answer, and all but a possible stop is out."""
    final, _ = expected(text, stops)
    watch, out, seen = StopWatch(stops), "", ""
    for piece in cut(text, places):
        out += watch.push(piece)
        seen += piece
        assert final.startswith(out)
        if watch.matched is not None:
            break
        held = len(seen) - len(out)
        assert held < max((len(stop) for stop in stops), default=1)

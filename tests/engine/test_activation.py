"""Where adapters act in a sequence, and the virtual tokens before it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.activation import NEVER, activations, check_alone
from server.engine.request import GenerationRequest, WeightedAdapter
from server.engine.sequence import Sequence
from server.errors import InvalidRequest


def start(prompt: list[int], invocation: tuple[int, ...], virtual: int = 0) -> int:
    adapters = (WeightedAdapter("plain"), WeightedAdapter("invoked", 1.0, virtual, invocation))
    plain, invoked = activations(adapters, prompt, virtual)
    assert (plain.start, plain.adapter, invoked.adapter) == (0, *adapters)
    return invoked.start


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([7, 9, 7], 0),
        ([1, 7, 9, 7, 2], 1),
        ([7, 9, 7, 9, 7], 2),
        ([7, 9, 7, 1, 7, 9, 7, 7, 9], 4),
        ([7, 9, 1, 7], NEVER),
        ([9, 7], NEVER),
    ],
)
def test_an_adapter_acts_from_its_last_invocation_on(prompt: list[int], expected: int) -> None:
    assert start(prompt, (7, 9, 7)) == expected
    assert start(prompt, (7, 9, 7), virtual=4) == (NEVER if expected == NEVER else expected + 4)
    assert start(prompt, ()) == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_it_is_the_last_of_all_occurrences(prompt: list[int], invocation: list[int]) -> None:
    size = len(invocation)
    places = [i for i in range(len(prompt)) if prompt[i : i + size] == invocation]
    assert start(prompt, tuple(invocation)) == (max(places) if places else NEVER)


def test_a_sequence_keeps_virtual_tokens_apart() -> None:
    request = GenerationRequest("a", (5, 6, 7), adapters=(WeightedAdapter("x", virtual_tokens=4),))
    sequence = Sequence(request, (5, 6, 7), 8, "base", 4)
    assert (sequence.num_virtual, sequence.num_prompt, sequence.num_remaining) == (4, 7, 7)
    assert (sequence.prompt, sequence.output) == ([5, 6, 7], [])
    sequence.tokens += [8, 9]
    assert (sequence.prompt, sequence.output, sequence.num_output) == ([5, 6, 7], [8, 9], 2)
    other = Sequence(request, (5, 6, 8), 8, "base", 4)
    ours, theirs = (each.keys.upto(each.tokens, 7) for each in (sequence, other))
    assert ours == theirs
    assert len(ours) == 1


def test_virtual_tokens_are_those_of_one_adapter_alone() -> None:
    virtual = WeightedAdapter("x", virtual_tokens=4)
    check_alone(())
    check_alone((virtual,))
    check_alone((WeightedAdapter("y", 0.5), WeightedAdapter("z", 2.0)))
    for adapters in ((virtual, WeightedAdapter("y")), (WeightedAdapter("x", 0.5, 4),), (virtual, virtual)):
        with pytest.raises(InvalidRequest) as caught:
            check_alone(adapters)
        assert (caught.value.status, caught.value.code) == (400, "context_composed")

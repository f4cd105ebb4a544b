"""Keys of cached prefixes: equal exactly when base, adapters, weights, salt, block size and tokens are equal."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.activation import NEVER, Activation
from server.engine.block_pool import PrefixKeys
from server.engine.request import WeightedAdapter
from tests.engine.support import make_sequence

TOKENS = list(range(10, 22))
SAME: dict[str, Any] = {
    "fingerprint": "base",
    "adapters": (Activation(WeightedAdapter("d1", 1.0)), Activation(WeightedAdapter("d2", 0.5))),
    "salt": "tenant",
    "block_size": 4,
}


def keys(tokens: list[int] = TOKENS, **changes: Any) -> list[bytes]:
    return PrefixKeys(**(SAME | changes)).upto(tokens, len(tokens))


def acting(*adapters: tuple[str, float] | tuple[str, float, int]) -> tuple[Activation, ...]:
    """(digest, weight, start)."""
    return tuple(Activation(WeightedAdapter(digest, weight), *start) for digest, weight, *start in adapters)


def test_equal_inputs_have_equal_keys() -> None:
    assert keys() == keys()
    assert len(keys()) == 3
    assert len(set(keys())) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "other base"},
        {"salt": "other tenant"},
        {"salt": ""},
        {"adapters": ()},
        {"adapters": acting(("d1", 1.0))},
        {"adapters": acting(("d1", 1.0), ("d3", 0.5))},
        {"adapters": acting(("d1", 1.0), ("d2", 0.5000001))},
        {"adapters": acting(("d1", 0.5), ("d2", 1.0))},
        {"adapters": acting(("d1", 1.0), ("d2", 0.5, 1))},
        {"adapters": acting(("d1', 1.0), ('d2", 0.5))},
        {"fingerprint": "base', [", "salt": ""},
    ],
    ids=str,
)
def test_every_part_of_the_identity_changes_every_key(changes: dict[str, Any]) -> None:
    assert not set(keys(**changes)) & set(keys())


def test_block_size_changes_every_key() -> None:
    assert not set(keys(block_size=2)) & set(keys())
    assert not set(keys(block_size=6)) & set(keys())


@pytest.mark.parametrize("position", range(len(TOKENS)))
def test_a_token_changes_its_block_and_all_later_ones(position: int) -> None:
    changed = list(TOKENS)
    changed[position] += 1
    same = [a == b for a, b in zip(keys(changed), keys(), strict=True)]
    assert same == [index < position // 4 for index in range(3)]


def test_token_borders_are_part_of_the_key() -> None:
    assert keys([1, 23, 4, 5]) != keys([12, 3, 4, 5])
    assert keys([1, 2, 3, 45]) != keys([1, 2, 34, 5])


def test_only_full_blocks_have_keys() -> None:
    own = PrefixKeys(**SAME)
    assert [len(own.upto(TOKENS, n)) for n in range(13)] == [n // 4 for n in range(13)]


def test_growing_step_by_step_gives_the_same_keys_as_at_once() -> None:
    own, tokens = PrefixKeys(**SAME), TOKENS[:3]
    grown = []
    for token in TOKENS[3:]:
        tokens.append(token)
        grown = own.upto(tokens, len(tokens))
    assert grown == keys()
    assert own.upto(tokens, 4) == keys()[:1]


def test_neither_request_id_nor_sampling_play_a_part() -> None:
    one, two = (make_sequence(name, TOKENS, adapters=["d1"]) for name in ("one", "two"))
    assert one.keys.upto(one.tokens, 12) == two.keys.upto(two.tokens, 12)


identity = st.fixed_dictionaries(
    {
        "fingerprint": st.sampled_from(["b", "b1", "1"]),
        "adapters": st.lists(
            st.builds(
                Activation,
                st.builds(WeightedAdapter, st.sampled_from(["d", "e", "d1"]), st.sampled_from([0.5, 1.0, -1.0])),
                st.sampled_from([0, 2, NEVER]),
            ),
            max_size=2,
        ).map(tuple),
        "salt": st.sampled_from(["", "b", "s"]),
        "block_size": st.sampled_from([1, 2, 3]),
    }
)
tokens = st.lists(st.sampled_from([0, 1, 2, 11, 12]), min_size=3, max_size=6)


def meant(identity: dict[str, Any], tokens: list[int]) -> tuple[dict[str, Any], list[int]]:
    end = len(tokens) // identity["block_size"] * identity["block_size"]
    parts = tuple(activation for activation in identity["adapters"] if activation.start < end)
    return identity | {"adapters": parts}, tokens[:end]


def test_blocks_before_an_adapter_acts_are_those_of_the_base() -> None:
    base, late = keys(adapters=()), keys(adapters=acting(("d1", 1.0, 5)))
    assert late[0] == base[0]
    assert not set(late[1:]) & set(base)
    assert not set(late[1:]) & set(keys(adapters=acting(("d1", 1.0, 6))))
    assert keys(adapters=acting(("d1", 1.0, NEVER))) == base


@settings(max_examples=300, deadline=None, derandomize=True)
@given(identity, tokens, identity, tokens)
def test_keys_meet_only_where_identity_and_tokens_meet(
    a: dict[str, Any], first: list[int], b: dict[str, Any], second: list[int]
) -> None:
    """The last key of each, against plain equality of what it stands for: an adapter that acts later has no part."""
    meant_a, meant_b = meant(a, first), meant(b, second)
    key_a = PrefixKeys(**a).upto(first, len(first))[-1]
    key_b = PrefixKeys(**b).upto(second, len(second))[-1]
    assert (key_a == key_b) == (meant_a == meant_b)

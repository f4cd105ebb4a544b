"""A full queue: who floods gives way to others, and only as far as they hold less."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.queue_share import giving_way
from server.engine.request import FinishReason, SamplingParams
from server.errors import Overloaded
from tests.engine.front import PROMPT, collect, running, tokens


@dataclass(frozen=True)
class Place:
    name: str
    tenant: str
    adapters: str = ""
    waits: bool = True


def held(text: str) -> list[Place]:
    """`a a:x b*`: tenant, adapter, and a star for those that run."""
    found = []
    for index, part in enumerate(text.split()):
        tenant, _, adapters = part.rstrip("*").partition(":")
        found.append(Place(f"{index}", tenant, adapters, not part.endswith("*")))
    return found


def names(text: str, tenant: str, adapters: str = "", count: int = 1) -> str:
    return " ".join(place.name for place in giving_way(held(text), tenant, adapters, count))


@pytest.mark.parametrize(
    ("text", "tenant", "adapters", "expected"),
    [
        ("a* a a a", "b", "", "3"),
        ("a* a a b a", "c", "", "4"),
        ("a* a* a* a*", "b", "", ""),
        ("a* a* a* b b", "c", "", "4"),
        ("a b", "c", "", ""),
        ("a a b", "b", "", ""),
        ("a a a", "a", "", ""),
        ("a:x a:x a:y", "a", "y", ""),
        ("a:x a:x a:x a:x a:y", "a", "y", "3"),
        ("a:x a:y a:y a:x a:x", "b", "y", "4"),
        ("a:y a:y a:x a:y a:x", "b", "x", "3"),
        ("b b b a:x a:x", "a", "y", "4"),
    ],
)
def test_who_gives_way(text: str, tenant: str, adapters: str, expected: str) -> None:
    assert names(text, tenant, adapters) == expected


def test_several_at_once_are_given_as_many_as_is_fair() -> None:
    assert names("a a a a a a", "b", count=3) == "5 4 3"
    assert names("a a a a a a", "b", count=5) == "5 4 3", "fewer: not all of them may have a place"


@given(
    places=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), min_size=4, max_size=40),
    tenant=st.sampled_from("abcd"),
    adapters=st.sampled_from("xyz"),
)
def test_each_tenant_is_sure_of_its_share(places: list[tuple[str, str]], tenant: str, adapters: str) -> None:
    """All wait, so all may be asked to go."""
    everyone = [Place(str(index), *place) for index, place in enumerate(places)]
    before = Counter(place.tenant for place in everyone)
    gone = giving_way(everyone, tenant, adapters, 1)
    active = len({*before, tenant})
    if before[tenant] < len(everyone) // active - 1:
        assert gone
    for place in gone:
        if place.tenant != tenant:
            assert before[place.tenant] - 1 >= before[tenant] + 1, "it still holds no less"
        assert place.adapters != adapters or place.tenant != tenant


class TestThroughTheEngine:
    async def test_a_flood_does_not_keep_another_tenant_out(self) -> None:
        async with running(max_running=2, max_queued=6) as own:
            own.runner.close_gate()
            flood = [await own.submit(f"flood{index}") for index in range(8)]
            await own.runner.at_gate()
            with pytest.raises(Overloaded):
                await own.submit("flood8")
            quiet = [await own.submit(f"quiet{index}", tenant="quiet") for index in range(2)]
            own.engine.check_capacity(2, "quiet")
            with pytest.raises(Overloaded):
                own.engine.check_capacity(3, "quiet")
            assert own.engine._admitted == 8
            own.runner.open_gate()
            for stream in (*flood[:6], *quiet):
                assert len(tokens(await collect(stream))) == 4
            for stream in flood[6:]:
                [output] = await collect(stream)
                assert output.finish_reason is FinishReason.ERROR
                assert isinstance(output.error, Overloaded)
                assert output.error.retry_after
            await own.settle()
            own.assert_idle()

    async def test_nor_another_adapter_of_the_same(self) -> None:
        async with running(max_running=1, max_queued=3) as own:
            own.runner.close_gate()
            flood = [await own.submit(f"flood{index}", adapters=["x"]) for index in range(4)]
            quiet = await own.submit("quiet", PROMPT, SamplingParams(max_tokens=2), adapters=["y"])
            own.runner.open_gate()
            assert len(tokens(await collect(quiet))) == 2
            ended = [(await collect(stream))[-1].finish_reason for stream in flood]
            assert ended == [FinishReason.LENGTH] * 3 + [FinishReason.ERROR]
            await own.settle()
            own.assert_idle()

    async def test_who_runs_is_not_pushed_out(self) -> None:
        async with running(max_running=3, max_queued=0) as own:
            own.runner.close_gate()
            streams = [await own.submit(f"flood{index}") for index in range(3)]
            await own.runner.at_gate()
            own.runner.arrived.clear()
            own.runner.gate.release()
            await own.runner.at_gate()  # all three have begun
            with pytest.raises(Overloaded):
                await own.submit("quiet", tenant="quiet")
            own.runner.open_gate()
            for stream in streams:
                assert len(tokens(await collect(stream))) == 4
            own.assert_idle()

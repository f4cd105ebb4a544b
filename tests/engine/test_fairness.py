"""One tenant floods, or one adapter of a tenant, and the others hardly notice. Counted in steps and tokens.

What these tests claim must fail with the queue as it was before, which is `ByArrival` here.
"""

from collections import Counter
from collections.abc import Hashable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.fair_queue import OUTPUT_COST, FairQueue
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import PATIENCE, Scheduler
from server.engine.sequence import Sequence
from server.engine.turns import MAX_PREEMPTIONS
from tests.engine.front import PROMPT, Front, collect, running
from tests.engine.support import add, load, make_scheduler, plan, prompt, run, step

LANES = pytest.mark.parametrize(
    "own", [{"tenant": "quiet"}, {"adapters": ["q"]}], ids=["another_tenant", "another_adapter"]
)


class ByArrival(FairQueue):
    """All sequences as if they were of one tenant and one adapter."""

    def names(self, sequence: Sequence) -> tuple[Hashable, Hashable]:
        return "all", frozenset[str]()


def scheduler(queue: type[FairQueue] = FairQueue, **sizes: int) -> Scheduler:
    made = make_scheduler(**({"blocks": 200, "budget": 64, "max_running": 4} | sizes))
    load(made.adapters, "q")
    made.waiting = queue()
    return made


def steps_until_begun(made: Scheduler, sequence: Sequence, at_most: int = 2_000) -> int:
    for count in range(1, at_most):
        if any(entry.sequence is sequence for entry in step(made).entries):
            return count
    raise AssertionError("it never began")


@LANES
@pytest.mark.parametrize(("queue", "holds"), [(FairQueue, True), (ByArrival, False)])
def test_a_flood_of_short_requests_delays_another_by_one_of_them(
    queue: type[FairQueue], holds: bool, own: dict[str, object]
) -> None:
    made = scheduler(queue)
    for index in range(100):
        add(made, f"flood{index}", 6, max_tokens=8)
    for _ in range(3):
        step(made)
    quiet = add(made, "quiet", 6, max_tokens=8, **own)
    steps = steps_until_begun(made, quiet)
    assert (steps <= 1 + 8) is holds, steps
    assert (steps > 100) is not holds, steps


@LANES
@pytest.mark.parametrize(("queue", "holds"), [(FairQueue, True), (ByArrival, False)])
def test_a_flood_of_endless_answers_makes_way(queue: type[FairQueue], holds: bool, own: dict[str, object]) -> None:
    made = scheduler(queue)
    for index in range(8):
        add(made, f"flood{index}", 6, max_tokens=150)
    step(made)
    quiet = add(made, "quiet", 6, max_tokens=8, **own)
    steps = steps_until_begun(made, quiet)
    assert (steps <= PATIENCE + 3) is holds, steps
    if holds:
        assert made.num_preemptions == 1
        assert len(made.running) == made.max_running
    run(made, at_most=1_000)


def test_equal_shares_make_way_for_nobody() -> None:
    made = scheduler()
    for index in range(8):
        add(made, str(index), 6, max_tokens=100, tenant="ab"[index % 2])
    for _ in range(5 * PATIENCE):
        step(made)
    assert made.num_preemptions == 0


def test_a_sequence_makes_way_only_so_often() -> None:
    made = scheduler(max_running=2)
    old = add(made, "old", 4, max_tokens=300)
    new = add(made, "new", 4, max_tokens=300)
    step(made)
    for index in range(MAX_PREEMPTIONS + 3):
        add(made, f"quiet{index}", 4, max_tokens=2, tenant=f"quiet{index}")
        for _ in range(PATIENCE + 6):
            step(made)
    run(made, at_most=2_000)
    assert (old.preemptions, new.preemptions) == (0, MAX_PREEMPTIONS)


def test_those_that_made_way_keep_their_tokens_and_come_before_their_own() -> None:
    made = scheduler(max_running=2)
    add(made, "old", 4, max_tokens=100)
    new = add(made, "new", 4, max_tokens=100)
    step(made)
    add(made, "later", 4, max_tokens=1)
    quiet = add(made, "quiet", 4, max_tokens=3, tenant="quiet")
    steps_until_begun(made, quiet)
    said = list(new.output)
    assert len(said) >= PATIENCE
    assert [s.request_id for s in made.waiting] == ["later", "new"]
    assert steps_until_begun(made, new) <= 3
    assert new.output[: len(said)] == said


def test_a_long_prompt_leaves_room_for_a_short_one() -> None:
    made = scheduler(budget=8)
    add(made, "long", 80, max_tokens=1)
    step(made)
    quiet = add(made, "quiet", 5, tenant="quiet", max_tokens=2)
    assert steps_until_begun(made, quiet) == 1
    assert plan(step(made))[0] == ("quiet", 5, 1), "and its decodes come first"
    behind = scheduler(ByArrival, budget=8)
    add(behind, "long", 80, max_tokens=1)
    step(behind)
    assert steps_until_begun(behind, add(behind, "quiet", 5, tenant="quiet", max_tokens=2)) >= 9


def test_long_prompts_share_the_budget() -> None:
    made = scheduler(budget=10)
    for index in range(3):
        add(made, f"a{index}", 100, max_tokens=1, tenant="a")
    add(made, "b0", 100, max_tokens=1, tenant="b")
    computed: Counter[str] = Counter()
    for _ in range(20):
        for name, _, count in plan(step(made)):
            computed[name[0]] += count
    assert abs(computed["a"] - computed["b"]) <= 10


def test_where_not_all_can_decode_each_tenant_does() -> None:
    made = scheduler(budget=4, max_running=12)
    for index in range(8):
        add(made, f"a{index}", 1, max_tokens=60, tenant="a")
    for _ in range(4):
        step(made)
    add(made, "b", 1, max_tokens=60, tenant="b")
    while "b" not in [s.request_id for s in made.running]:
        step(made)
    for _ in range(5):
        names = [name for name, _, _ in plan(step(made))]
        assert {"a0", "b"} <= set(names)
        assert len(names) == 4


def test_for_want_of_memory_the_one_that_runs_most_gives_way() -> None:
    made = scheduler(blocks=8, max_running=8)
    for name in ("a0", "a1"):
        add(made, name, 3, max_tokens=24, tenant="a")
    step(made)
    add(made, "b0", 3, max_tokens=24, tenant="b")
    step(made)
    assert [s.request_id for s in made.running] == ["a0", "a1", "b0"]
    while not made.num_preemptions:
        step(made)
    assert made.waiting.head is not None
    assert made.waiting.head.request_id == "a1", "not the newest of all"
    run(made)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=2, max_size=6),
    others=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=2, max_size=6),
    max_running=st.integers(1, 6),
    budget=st.integers(1, 40),
    blocks=st.integers(13, 80),
    level=st.sampled_from(["tenant", "adapters"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_two_that_always_wait_are_served_alike(
    sizes: list[tuple[int, int]],
    others: list[tuple[int, int]],
    max_running: int,
    budget: int,
    blocks: int,
    level: str,
) -> None:
    """Twice the bound of `fair_queue`, for services and not counters are compared, which begin apart by as much."""
    made = scheduler(max_running=max_running, budget=budget, blocks=blocks)
    kinds: list[dict[str, Any]] = [{"tenant": "a"}, {"tenant": "b"}] if level == "tenant" else [{}, {"adapters": ["q"]}]
    dearest = max(length + OUTPUT_COST * answer for length, answer in sizes + others)
    bound = (max_running + 1) * dearest
    service: Counter[int] = Counter()
    sent: Counter[int] = Counter()
    of: dict[str, int] = {}
    answered: Counter[Sequence] = Counter()

    def fill() -> None:
        """Two of each always wait."""
        for number, (kind, mine) in enumerate(zip(kinds, (sizes, others), strict=True)):
            while sum(of[s.request_id] == number for s in made.waiting) < 2:
                length, answer = mine[sent[number] % len(mine)]
                name = f"{number}-{sent[number]}"
                of[name], sent[number] = number, sent[number] + 1
                add(made, name, 0, tokens=prompt(length, 1 + sum(sent.values())), max_tokens=answer, **kind)

    fill()
    for _ in range(80):
        for entry in step(made).entries:
            sequence = entry.sequence
            fresh = sequence.num_output - answered[sequence]
            answered[sequence] = sequence.num_output
            service[of[sequence.request_id]] += entry.count + (OUTPUT_COST - 1) * fresh
        fill()
        ranks = [next(made.waiting.rank(s) for s in made.waiting if of[s.request_id] == number) for number in (0, 1)]
        counters = [rank[0 if level == "tenant" else 1] for rank in ranks]
        assert abs(counters[0] - counters[1]) <= bound
        assert abs(service[0] - service[1]) <= 2 * bound


class TestThroughTheEngine:
    """As the server runs it: AsyncEngine, its thread, EngineCore. Steps are those of the scripted model."""

    async def flood(self, own: Front, sampling: SamplingParams) -> int:
        """Steps from the arrival of one request, while four of a flood run and 96 wait, to its first token."""
        own.runner.close_gate()
        submit = partial(own.submit, prompt=PROMPT, sampling=sampling)
        streams = [await submit(f"flood{index}") for index in range(4)]
        await own.runner.at_gate()
        own.runner.arrived.clear()
        own.runner.gate.release()
        await own.runner.at_gate()  # of the second step, which has all four
        assert len(own.runner.runs) == 1
        streams += [await submit(f"flood{index}") for index in range(4, 100)]
        before = len(own.runner.runs) + 1  # and the one at the gate
        quiet = await own.engine.submit(GenerationRequest("quiet", tuple(PROMPT), sampling, tenant="quiet"))
        own.runner.open_gate()
        async for output in quiet:
            assert output.token_id is not None
            break
        first = next(index for index, ids in enumerate(own.runner.runs) if "quiet" in ids)
        await quiet.aclose()
        for stream in streams:
            assert len(await collect(stream)) == sampling.max_tokens, "the flood is answered too"
        await own.settle()
        own.assert_idle()
        return first - before + 1

    @pytest.mark.parametrize("answer", [6, 40])
    async def test_the_first_token_of_another_comes_within_steps(self, answer: int) -> None:
        async with running(blocks=64, max_running=4, max_queued=200) as own:
            steps = await self.flood(own, SamplingParams(max_tokens=answer, ignore_eos=True))
        assert steps <= min(answer, PATIENCE + 1) + 2

    async def test_by_arrival_it_would_not(self) -> None:
        async with running(blocks=64, max_running=4, max_queued=200) as own:
            own.fake.scheduler.waiting = ByArrival()
            steps = await self.flood(own, SamplingParams(max_tokens=6, ignore_eos=True))
        assert steps >= 96 // 4 * 6

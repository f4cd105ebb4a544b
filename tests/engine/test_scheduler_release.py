"""Adapters of waiting and running sequences, and taking a sequence out in any state: nothing of it may stay."""

import pytest

from server.engine.scheduler import MAX_OVERTAKES, Scheduler
from server.engine.status import Residency
from tests.engine.support import BLOCK, PAGE, add, check_batch, load, make_scheduler, plan, prompt, run, step

TORCH_FREE = ("scheduler", "block_pool", "adapter_pool", "page_allocator", "batch", "sequence", "request", "status")


class TestAdapters:
    def test_a_request_waits_for_its_adapter_and_holds_it_while_it_runs(self) -> None:
        scheduler = make_scheduler()
        sequence = add(scheduler, "a", 3, adapters=["x"], max_tokens=2)
        assert plan(step(scheduler)) == []
        assert scheduler.adapters.residency("x") is Residency.LOADING
        assert scheduler.adapters.take_wanted(1) == ["x"]
        scheduler.adapters.place("x", [PAGE])
        assert plan(step(scheduler)) == [("a", 0, 3)]
        scheduler.adapters.check_integrity([["x"]])
        step(scheduler)
        assert sequence not in scheduler.running
        scheduler.adapters.check_integrity([])

    def test_a_request_of_several_adapters_needs_them_all(self) -> None:
        scheduler = make_scheduler()
        add(scheduler, "a", 3, adapters=[("x", 0.3), ("y", 0.7)])
        for digest in scheduler.adapters.take_wanted(2):
            assert plan(step(scheduler)) == []
            scheduler.adapters.place(digest, [PAGE])
        assert plan(step(scheduler)) == [("a", 0, 3)]

    def test_nobody_waits_for_the_adapter_of_another(self) -> None:
        scheduler = make_scheduler()
        load(scheduler.adapters, "y")
        waits = add(scheduler, "waits", 3, adapters=["x"])
        add(scheduler, "base", 3)
        add(scheduler, "other", 3, adapters=["y"])
        assert [name for name, _, _ in plan(step(scheduler))] == ["base", "other"]
        assert waits.overtaken == 2
        scheduler.adapters.take_wanted(1)
        scheduler.adapters.place("x", [PAGE])
        assert "waits" in [name for name, _, _ in plan(step(scheduler))]

    def test_overtaking_is_bounded(self) -> None:
        """An adapter that never finds room because others come and go: at last nobody else is admitted."""
        scheduler = make_scheduler(max_running=4)
        waits = add(scheduler, "waits", 3, adapters=["x"])
        overtaken = 0
        for index in range(MAX_OVERTAKES + 20):
            add(scheduler, str(index), 1, tokens=[5], max_tokens=1)
            overtaken += len(step(scheduler).entries)
        assert overtaken == waits.overtaken == MAX_OVERTAKES
        scheduler.adapters.take_wanted(1)
        scheduler.adapters.place("x", [PAGE])
        assert plan(step(scheduler))[0] == ("waits", 0, 3)
        run(scheduler)

    def test_those_in_front_of_a_patient_sequence_still_go(self) -> None:
        scheduler = make_scheduler()
        add(scheduler, "front", 2, max_tokens=1)
        add(scheduler, "waits", 2, adapters=["x"]).overtaken = MAX_OVERTAKES
        add(scheduler, "behind", 2, max_tokens=1)
        assert [name for name, _, _ in plan(step(scheduler))] == ["front"]

    def test_the_head_of_the_queue_names_what_is_awaited(self) -> None:
        scheduler = make_scheduler()
        assert scheduler.awaited == frozenset()
        add(scheduler, "a", 3, adapters=["x", "y"])
        add(scheduler, "b", 3, adapters=["z"])
        assert scheduler.awaited == {"x", "y"}

    def test_an_evicted_adapter_is_asked_for_again(self) -> None:
        scheduler = make_scheduler(pages=1, max_running=1)
        load(scheduler.adapters, "x")
        add(scheduler, "runs", 3, max_tokens=3)
        step(scheduler)
        add(scheduler, "a", 3, adapters=["x"], max_tokens=1)
        load(scheduler.adapters, "y")
        assert scheduler.adapters.residency("x") is Residency.ABSENT
        step(scheduler)
        step(scheduler)
        assert plan(step(scheduler)) == []
        assert scheduler.adapters.take_wanted(1) == ["x"]

    def test_preemption_gives_the_adapter_back(self) -> None:
        scheduler = make_scheduler()
        load(scheduler.adapters, "x")
        sequence = add(scheduler, "a", 3, adapters=["x"])
        step(scheduler)
        scheduler._preempt(sequence)
        scheduler.check_integrity()
        scheduler.adapters.check_integrity([])


class TestRemove:
    """Every state that a sequence can be taken out of: nothing of it may stay."""

    def assert_clean(self, scheduler: Scheduler) -> None:
        scheduler.check_integrity()
        scheduler.blocks.check_integrity([])
        scheduler.adapters.check_integrity([])
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.schedule().entries == ()

    def test_waiting(self) -> None:
        scheduler = make_scheduler()
        scheduler.remove(add(scheduler, "a", 3))
        self.assert_clean(scheduler)

    def test_waiting_for_an_adapter(self) -> None:
        scheduler = make_scheduler()
        sequence = add(scheduler, "a", 3, adapters=["x"])
        step(scheduler)
        scheduler.remove(sequence)
        self.assert_clean(scheduler)

    @pytest.mark.parametrize("steps", range(6))
    def test_in_mid_prefill_and_decode(self, steps: int) -> None:
        scheduler = make_scheduler(budget=4)
        load(scheduler.adapters, "x")
        sequence = add(scheduler, "a", 10, adapters=["x"], max_tokens=8)
        for _ in range(steps):
            step(scheduler)
        scheduler.remove(sequence)
        self.assert_clean(scheduler)

    def test_scheduled_and_not_yet_computed(self) -> None:
        scheduler = make_scheduler()
        sequence = add(scheduler, "a", 9)
        check_batch(scheduler, scheduler.schedule())
        scheduler.remove(sequence)
        self.assert_clean(scheduler)
        assert scheduler.blocks.match(sequence.keys.upto(sequence.tokens, 8)) == []

    def test_preempted(self) -> None:
        scheduler = make_scheduler()
        sequence = add(scheduler, "a", 9)
        step(scheduler)
        scheduler._preempt(sequence)
        scheduler.remove(sequence)
        self.assert_clean(scheduler)

    def test_twice_is_harmless(self) -> None:
        scheduler = make_scheduler()
        sequence = add(scheduler, "a", 3)
        step(scheduler)
        scheduler.remove(sequence)
        scheduler.remove(sequence)
        self.assert_clean(scheduler)

    def test_while_another_shares_the_prefix(self) -> None:
        scheduler = make_scheduler()
        tokens = prompt(9)
        add(scheduler, "a", 0, tokens=tokens, max_tokens=3)
        step(scheduler)
        sharer = add(scheduler, "b", 0, tokens=tokens, max_tokens=3)
        step(scheduler)
        scheduler.remove(sharer)
        scheduler.check_integrity()
        run(scheduler)
        self.assert_clean(scheduler)


def test_integrity_finds_blocks_of_a_waiting_sequence() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, "a", 3)
    sequence.num_computed = 1
    with pytest.raises(AssertionError, match="waiting"):
        scheduler.check_integrity()


def test_integrity_finds_a_lost_block() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, "a", BLOCK + 1)
    step(scheduler)
    sequence.block_table.pop()
    with pytest.raises(AssertionError, match="references"):
        scheduler.check_integrity()

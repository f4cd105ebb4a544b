"""What each step computes: order, budget, prefix hits, preemption, adapters, aborts. No model, no torch."""

import subprocess
import sys

import pytest

from server.engine.request import SamplingParams
from server.engine.turns import MAX_PREEMPTIONS, victim
from tests.engine.support import (
    add,
    load,
    make_scheduler,
    plan,
    prompt,
    run,
    step,
)

TORCH_FREE = (
    "scheduler",
    "block_pool",
    "adapter_pool",
    "page_allocator",
    "batch",
    "sequence",
    "request",
    "status",
    "fair_queue",
    "turns",
)


def test_nothing_to_do_is_an_empty_batch() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule().entries == ()
    scheduler.check_integrity()


def test_a_request_is_prefilled_then_decoded_one_token_at_a_time() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, "a", 5, max_tokens=3)
    assert [plan(batch) for batch in run(scheduler)] == [[("a", 0, 5)], [("a", 5, 1)], [("a", 6, 1)]]
    assert sequence.output == [7, 7, 7]
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_a_long_prompt_is_prefilled_in_chunks_within_the_budget() -> None:
    scheduler = make_scheduler(budget=6)
    add(scheduler, "a", 15, max_tokens=1)
    seen = []
    for _ in range(3):
        batch = scheduler.schedule()
        seen.append((plan(batch), batch.entries[0].samples))
        scheduler.computed(batch.entries[0])
    assert seen == [([("a", 0, 6)], False), ([("a", 6, 6)], False), ([("a", 12, 3)], True)]


def test_decodes_come_before_prefills_and_prefills_take_the_rest() -> None:
    scheduler = make_scheduler(budget=6, blocks=32)
    add(scheduler, "long", 20, max_tokens=2)
    add(scheduler, "short", 3, max_tokens=9)
    assert plan(step(scheduler)) == [("long", 0, 6)]
    while scheduler.running[0].num_remaining > 4:
        step(scheduler)
    assert plan(step(scheduler)) == [("long", 18, 2), ("short", 0, 3)]
    add(scheduler, "later", 9, max_tokens=1)
    assert plan(step(scheduler)) == [("long", 20, 1), ("short", 3, 1), ("later", 0, 4)]
    assert plan(step(scheduler)) == [("short", 4, 1), ("later", 4, 5)]
    assert plan(step(scheduler)) == [("short", 5, 1)]


def test_a_running_decode_is_not_delayed_by_an_older_prefill() -> None:
    scheduler = make_scheduler(budget=4, blocks=32)
    add(scheduler, "quick", 2, max_tokens=9)
    add(scheduler, "prefill", 17, max_tokens=1)
    scheduler.running.reverse()
    step(scheduler)
    for _ in range(4):
        scheduler.running.sort(key=lambda s: s.request_id == "quick")  # the prefill stands first in the list
        assert plan(step(scheduler))[0][0] == "quick"


def test_prompts_share_a_step_and_arrive_in_order() -> None:
    scheduler = make_scheduler(budget=16)
    for name in ("a", "b", "c"):
        add(scheduler, name, 6)
    assert plan(step(scheduler)) == [("a", 0, 6), ("b", 0, 6), ("c", 0, 4)]
    assert plan(step(scheduler)) == [("a", 6, 1), ("b", 6, 1), ("c", 4, 2)]


def test_no_more_run_than_allowed() -> None:
    scheduler = make_scheduler(max_running=2)
    for index in range(5):
        add(scheduler, str(index), 3, max_tokens=2)
    step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["0", "1"]
    step(scheduler)
    step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["2", "3"]
    run(scheduler)


def test_admission_stops_when_the_budget_is_spent() -> None:
    scheduler = make_scheduler(budget=4)
    add(scheduler, "a", 4)
    add(scheduler, "b", 1)
    assert plan(step(scheduler)) == [("a", 0, 4)]
    assert [s.request_id for s in scheduler.waiting] == ["b"]


class TestPrefixCache:
    def test_a_second_request_computes_only_what_is_new(self) -> None:
        scheduler = make_scheduler()
        shared = prompt(8)
        add(scheduler, "a", 0, tokens=[*shared, 1], max_tokens=1)
        run(scheduler)
        second = add(scheduler, "b", 0, tokens=[*shared, 2, 3], max_tokens=1)
        assert plan(step(scheduler)) == [("b", 8, 2)]
        assert second.num_cached == 8
        assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (9 + 10, 8)

    def test_the_last_token_is_always_computed(self) -> None:
        scheduler = make_scheduler()
        tokens = prompt(8)
        add(scheduler, "a", 0, tokens=tokens, max_tokens=1)
        run(scheduler)
        again = add(scheduler, "b", 0, tokens=tokens, max_tokens=1)
        assert plan(step(scheduler)) == [("b", 4, 4)]
        assert again.num_cached == 4

    def test_output_is_cached_too(self) -> None:
        """The next turn of a conversation begins with this turn's answer."""
        scheduler = make_scheduler()
        first = add(scheduler, "a", 6, max_tokens=4)
        run(scheduler)
        add(scheduler, "b", 0, tokens=[*first.tokens, 1, 2], max_tokens=1)
        assert plan(step(scheduler)) == [("b", 8, 4)]

    def test_two_running_requests_share_blocks(self) -> None:
        scheduler = make_scheduler()
        shared = prompt(8)
        one = add(scheduler, "a", 0, tokens=[*shared, 1], max_tokens=9)
        step(scheduler)
        two = add(scheduler, "b", 0, tokens=[*shared, 2], max_tokens=9)
        step(scheduler)
        assert one.block_table[:2] == two.block_table[:2]
        assert one.block_table[2] != two.block_table[2]
        scheduler.remove(one)
        scheduler.check_integrity()
        run(scheduler)

    @pytest.mark.parametrize(
        "other", [{"adapters": ["b"]}, {"adapters": [("a", 0.5)]}, {"adapters": []}, {"tenant": "other"}], ids=str
    )
    def test_nothing_is_shared_across_adapters_weights_or_tenants(self, other: dict[str, object]) -> None:
        scheduler = make_scheduler()
        load(scheduler.adapters, "a")
        load(scheduler.adapters, "b")
        tokens = prompt(9)
        add(scheduler, "one", 0, tokens=tokens, adapters=["a"], max_tokens=1)
        run(scheduler)
        add(scheduler, "two", 0, tokens=tokens, **({"adapters": ["a"]} | other), max_tokens=1)
        assert plan(step(scheduler)) == [("two", 0, 9)]
        assert scheduler.num_prefix_hits == 0

    def test_prompt_logprobs_need_every_token_computed(self) -> None:
        scheduler = make_scheduler()
        tokens = prompt(9)
        add(scheduler, "a", 0, tokens=tokens, max_tokens=1)
        run(scheduler)
        second = add(scheduler, "b", 0, tokens=tokens, max_tokens=1, sampling=SamplingParams(prompt_logprobs=0))
        assert plan(step(scheduler)) == [("b", 0, 9)]
        assert second.num_cached == 0
        third = add(scheduler, "c", 0, tokens=tokens, max_tokens=1)
        step(scheduler)
        assert third.num_cached == 8

    def test_a_prefix_being_computed_is_not_handed_out_yet(self) -> None:
        scheduler = make_scheduler(budget=8)
        tokens = prompt(9)
        one = add(scheduler, "a", 0, tokens=tokens, max_tokens=1)
        two = add(scheduler, "b", 0, tokens=tokens, max_tokens=1)
        batch = scheduler.schedule()
        assert plan(batch) == [("a", 0, 8)]
        scheduler.remove(one)  # aborted before the step was booked: nothing is known of its blocks
        assert plan(scheduler.schedule()) == [("b", 0, 8)]
        assert two.num_cached == 0

    def test_least_recently_used_prefixes_make_room(self) -> None:
        scheduler = make_scheduler(blocks=3)
        old, new = prompt(5, 1), prompt(5, 2)
        for index, tokens in enumerate([old, new, prompt(5, 3)]):
            add(scheduler, str(index), 0, tokens=tokens, max_tokens=1)
            run(scheduler)
        assert add(scheduler, "new", 0, tokens=new, max_tokens=1).num_cached == 0
        batch = step(scheduler)
        assert plan(batch) == [("new", 4, 1)]
        add(scheduler, "old", 0, tokens=old, max_tokens=1)
        assert plan(step(scheduler)) == [("old", 0, 5)]


class TestMemoryPressure:
    def test_admission_leaves_a_block_for_each_running_sequence(self) -> None:
        scheduler = make_scheduler(blocks=4, budget=32)
        add(scheduler, "a", 4, max_tokens=8)
        add(scheduler, "b", 4, max_tokens=8)
        add(scheduler, "c", 4, max_tokens=8)
        step(scheduler)
        assert [s.request_id for s in scheduler.running] == ["a", "b"]  # c would leave 1 block for 2

    def test_a_lone_request_may_take_every_block(self) -> None:
        scheduler = make_scheduler(blocks=4, budget=32)
        sequence = add(scheduler, "a", 15, max_tokens=1)
        step(scheduler)
        assert sequence.output == [7]

    def test_a_request_that_does_not_fit_keeps_its_place_in_the_queue(self) -> None:
        scheduler = make_scheduler(blocks=4, budget=32)
        add(scheduler, "a", 4, max_tokens=3)
        step(scheduler)
        add(scheduler, "big", 15, max_tokens=1)
        add(scheduler, "small", 2, max_tokens=1)
        assert plan(step(scheduler)) == [("a", 4, 1)]
        assert [s.request_id for s in scheduler.waiting] == ["big", "small"]
        assert [plan(batch)[0][0] for batch in run(scheduler)] == ["a", "big", "small"]

    def test_failing_admission_holds_no_adapter(self) -> None:
        scheduler = make_scheduler(blocks=4, budget=32)
        load(scheduler.adapters, "x")
        add(scheduler, "a", 4, max_tokens=9)
        step(scheduler)
        add(scheduler, "big", 15, adapters=["x"])
        step(scheduler)
        scheduler.check_integrity()
        assert scheduler.adapters.acquire(["x"])
        scheduler.adapters.release(["x"])

    def test_the_newest_is_preempted_and_later_computed_again_with_its_tokens(self) -> None:
        scheduler = make_scheduler(blocks=4, budget=32, max_running=2)
        old = add(scheduler, "old", 4, max_tokens=9)
        new = add(scheduler, "new", 4, max_tokens=9)
        add(scheduler, "third", 1, max_tokens=1)
        while not scheduler.num_preemptions:
            step(scheduler)
        assert [s.request_id for s in scheduler.running] == ["old"]
        assert [s.request_id for s in scheduler.waiting] == ["new", "third"], "it waits in front"
        assert (new.preemptions, old.preemptions) == (1, 0)
        said = list(new.tokens)
        assert new.num_output >= 1
        assert (new.block_table, new.num_computed) == ([], 0)
        batches = run(scheduler)
        assert new.tokens[: len(said)] == said
        assert (new.num_output, old.num_output) == (9, 9)
        back = next(entry for batch in batches for entry in batch.entries if entry.sequence is new)
        assert back.start < len(said)
        assert back.start + back.count == len(said), "its tokens are computed again in one go"

    def test_a_preempted_request_finds_its_own_prefix_again(self) -> None:
        scheduler = make_scheduler(blocks=8, budget=32)
        sequence = add(scheduler, "a", 9, max_tokens=9)
        step(scheduler)
        scheduler._preempt(sequence)
        batch = step(scheduler)
        assert plan(batch) == [("a", 8, 2)]
        assert sequence.num_cached == 0, "what the caller is told is the cache's state at the first admission"
        assert scheduler.num_prefix_queries == 9

    def test_nothing_is_admitted_in_a_step_that_preempts(self) -> None:
        scheduler = make_scheduler(blocks=4, budget=32)
        add(scheduler, "old", 4, max_tokens=9)
        add(scheduler, "new", 4, max_tokens=9)
        batches = []
        while not scheduler.num_preemptions:
            batches.append(step(scheduler))
        assert plan(batches[-1]) == [("old", 8, 1)]

    def test_a_preempted_entry_is_not_computed_in_the_same_step(self) -> None:
        """`new` decodes and is scheduled first; then `old`'s prefill takes its blocks."""
        scheduler = make_scheduler(blocks=4, budget=8)
        old = add(scheduler, "old", 12, max_tokens=4)
        step(scheduler)
        old.block_table, taken = old.block_table[:2], old.block_table[2:]
        scheduler.blocks.release(taken)
        new = add(scheduler, "new", 4, max_tokens=4)
        scheduler.waiting.take(new)
        new.block_table = scheduler.blocks.allocate(2) or []
        new.num_computed = 3
        scheduler.running.append(new)
        batch = scheduler.schedule()
        assert plan(batch) == [("old", 8, 4)]
        assert scheduler.waiting.head is new
        scheduler.check_integrity()

    def test_the_oldest_is_never_preempted(self) -> None:
        scheduler = make_scheduler(blocks=6, budget=32)
        sequences = [add(scheduler, str(index), 4, max_tokens=16) for index in range(4)]
        run(scheduler)
        assert scheduler.num_preemptions > 0
        assert sequences[0].preemptions == 0
        assert [s.num_output for s in sequences] == [16] * 4

    def test_those_preempted_often_are_spared(self) -> None:
        scheduler = make_scheduler(blocks=4)
        first, second, third = (add(scheduler, name, 1) for name in ("first", "second", "third"))
        lane_of = scheduler.waiting.lane
        assert victim([first, second, third], lane_of) is third
        third.preemptions = MAX_PREEMPTIONS
        assert victim([first, second, third], lane_of) is second
        second.preemptions = MAX_PREEMPTIONS
        assert victim([first, second, third], lane_of) is third, "when all have been preempted often, the newest goes"
        assert victim([first], lane_of) is first


def test_the_scheduler_and_its_parts_do_not_import_torch() -> None:
    modules = ", ".join(f"server.engine.{name}" for name in TORCH_FREE)
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'numpy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

"""The order of the queue: the least served first, nothing saved up, everything as before for one tenant alone."""

from collections.abc import Iterable

import pytest

from server.engine import fair_queue
from server.engine.batch import ScheduledSequence
from server.engine.fair_queue import OUTPUT_COST, FairQueue
from server.engine.sequence import Sequence
from tests.engine.support import make_sequence, prompt


class Queue:
    """A queue whose sequences are told by name; `cost` is what each is charged when it is taken."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.all: dict[str, Sequence] = {}

    def add(self, name: str, tenant: str = "a", adapters: Iterable[str] = ()) -> Sequence:
        sequence = self.all[name] = make_sequence(name, prompt(40), adapters=adapters, tenant=tenant)
        self.queue.add(sequence)
        return sequence

    def charge(self, name: str, count: int) -> None:
        self.queue.charge([ScheduledSequence(self.all[name], 0, count)])

    def taken(self, cost: int = 4, leaving: Iterable[str] = ()) -> str:
        """The names in the order in which they are admitted, those in `leaving` being passed over."""
        found = []
        for sequence in self.queue.in_turn():
            if sequence.request_id not in leaving:
                self.queue.take(sequence)
                self.charge(sequence.request_id, cost)
                found.append(sequence.request_id)
        return " ".join(found)

    def head(self) -> str | None:
        return self.queue.head.request_id if self.queue.head is not None else None


def test_one_lane_is_served_by_arrival() -> None:
    queue = Queue()
    for name in "abcdef":
        queue.add(name)
    assert queue.head() == "a"
    assert [sequence.request_id for sequence in queue.queue] == list("abcdef")
    assert queue.taken(3) == "a b c d e f"
    assert not len(queue.queue)
    assert queue.head() is None


def test_tenants_take_turns_however_many_wait() -> None:
    queue = Queue()
    for name in ("a1", "a2", "a3", "a4", "a5"):
        queue.add(name)
    queue.add("b1", "b")
    queue.add("c1", "c")
    queue.add("b2", "b")
    assert queue.taken() == "a1 b1 c1 a2 b2 a3 a4 a5"


def test_who_costs_more_is_served_less_often() -> None:
    queue = Queue()
    for index in range(3):
        queue.add(f"a{index}")
    for index in range(6):
        queue.add(f"b{index}", "b")
    order = []
    for _ in range(8):
        sequence = next(queue.queue.in_turn())
        queue.queue.take(sequence)
        queue.charge(sequence.request_id, 20 if sequence.request_id[0] == "a" else 5)
        order.append(sequence.request_id)
    assert " ".join(order) == "a0 b0 b1 b2 b3 a1 b4 b5"


def test_what_runs_is_charged_too() -> None:
    queue = Queue()
    runs = queue.add("a1")
    queue.queue.take(runs)
    for name, tenant in (("a2", "a"), ("b1", "b"), ("a3", "a"), ("b2", "b"), ("b3", "b")):
        queue.add(name, tenant)
    queue.charge("a1", 10)
    assert queue.taken() == "b1 b2 b3 a2 a3"


def test_a_token_of_the_answer_costs_more() -> None:
    queue = Queue()
    sequence = queue.add("a1")
    queue.charge("a1", 5)
    assert queue.queue.rank(sequence) == (5, 5)
    queue.queue.charge([ScheduledSequence(sequence, 39, 1)])
    assert queue.queue.rank(sequence) == (5 + OUTPUT_COST, 5 + OUTPUT_COST)


def test_the_adapters_of_a_tenant_take_turns_whatever_their_weights_and_order() -> None:
    queue = Queue()
    for index in range(3):
        queue.add(f"x{index}", adapters=["x", "y"] if index % 2 else ["y", "x"])
    queue.add("z", adapters=["z"])
    queue.add("base")
    queue.add("other", "b", ["x", "y"])
    assert queue.taken() == "x0 other z base x1 x2"


def test_a_tenant_with_many_adapters_has_no_more_than_one_with_none() -> None:
    queue = Queue()
    for index in range(4):
        queue.add(f"a{index}", adapters=[f"x{index}"])
    for index in range(4):
        queue.add(f"b{index}", "b")
    assert queue.taken() == "a0 b0 a1 b1 a2 b2 a3 b3"


def test_idleness_saves_nothing_up() -> None:
    queue = Queue()
    queue.add("b0", "b")
    assert queue.taken() == "b0"
    for index in range(100):
        queue.add(f"old{index}")
    queue.taken()
    for index in range(4):
        queue.add(f"a{index}")
        queue.add(f"b{index + 1}", "b")
    assert queue.taken() == "a0 b1 a1 b2 a2 b3 a3 b4", "b is not served until it has had as much as a ever had"


def test_nobody_is_lifted_by_an_empty_queue_alone() -> None:
    """a had much while it was alone, and left the queue last: b, which begins then, neither owes nor gains."""
    queue = Queue()
    queue.add("a0")
    queue.taken(500)
    queue.add("b0", "b")
    queue.add("b1", "b")
    queue.add("a1")
    queue.add("a2")
    assert queue.taken() == "b0 a1 b1 a2"


def test_a_lead_is_not_lost_by_pausing() -> None:
    queue = Queue()
    runs = queue.add("a0")
    queue.add("b0", "b")
    queue.taken()
    queue.charge("a0", 100)
    queue.queue.forget(runs)
    queue.add("b1", "b")
    queue.add("a1")
    queue.add("b2", "b")
    queue.add("b3", "b")
    assert queue.taken() == "b1 b2 b3 a1", "a has had 100 more"


def test_the_head_stays_the_head() -> None:
    queue = Queue()
    queue.charge(queue.add("a1").request_id, 9)
    assert queue.head() == "a1"
    queue.add("b1", "b")
    queue.charge("a1", 50)
    queue.charge(queue.add("a2").request_id, 1)
    assert queue.head() == "a1"
    assert next(queue.queue.in_turn()).request_id == "a1"
    assert queue.queue.least is queue.all["b1"]
    queue.queue.choose_again()
    assert queue.head() == "b1"
    queue.charge("b1", 500)
    queue.queue.choose_again()
    assert queue.head() == "a1"
    queue.queue.take(queue.all["a1"])
    assert queue.head() == "a2"


def test_those_preempted_come_first_and_those_that_made_way_before_their_own() -> None:
    queue = Queue()
    for name, tenant in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b")):
        queue.add(name, tenant)
    a1, b1 = queue.all["a1"], queue.all["b1"]
    queue.queue.take(a1)
    queue.queue.take(b1)
    queue.charge("b1", 4)
    queue.queue.put_first(b1)
    queue.queue.put_back(a1)
    assert (len(queue.queue), queue.head()) == (4, "b1")
    assert b1 in queue.queue
    assert [sequence.request_id for sequence in queue.queue] == ["b1", "a2", "b2", "a1"]
    assert queue.taken() == "b1 a1 a2 b2"


def test_one_passed_over_takes_those_with_it_that_need_the_same() -> None:
    queue = Queue()
    for index in range(3):
        queue.add(f"x{index}", adapters=["x"])
    queue.add("base0")
    queue.add("b0", "b", ["x"])
    queue.add("base1")
    seen = []
    for sequence in queue.queue.in_turn():
        seen.append(sequence.request_id)
        if "x" not in sequence.digests:
            queue.queue.take(sequence)
    assert sorted(seen) == ["b0", "base0", "base1", "x0"], "each set of adapters is asked for once for a tenant"
    assert [sequence.request_id for sequence in queue.queue] == ["x0", "x1", "x2", "b0"]


def test_only_so_many_idle_counters_are_kept() -> None:
    queue = Queue()

    def passes(name: str, tenant: str, adapters: Iterable[str] = ()) -> None:
        sequence = queue.add(name, tenant, adapters)
        queue.taken()
        queue.queue.forget(sequence)

    for index in range(fair_queue.MAX_IDLE_TENANTS + 50):
        passes(f"a{index}", f"tenant{index}")
    for index in range(fair_queue.MAX_IDLE_LANES + 50):
        passes(f"x{index}", "many", [f"x{index}"])
    tenants = queue.queue._tenants.known
    assert len(tenants) == fair_queue.MAX_IDLE_TENANTS
    assert len(tenants["many"].lanes.known) == fair_queue.MAX_IDLE_LANES
    assert "tenant0" not in tenants
    queue.add("again", "tenant0")
    assert queue.taken() == "again"


@pytest.mark.parametrize("by_tenant", [True, False])
def test_what_runs_comes_back_to_its_own_lane_however_many_others_came_and_went(by_tenant: bool) -> None:
    """A lane that was forgotten while one of its sequences ran had a second one of the same name: the queue broke."""
    queue = Queue()

    def admitted(name: str, index: int) -> Sequence:
        sequence = queue.add(name, f"t{index}" if by_tenant else "a", [] if by_tenant else [f"x{index}"])
        queue.queue.take(sequence)
        return sequence

    old = admitted("old", 0)
    for index in range(1, max(fair_queue.MAX_IDLE_TENANTS, fair_queue.MAX_IDLE_LANES) + 2):
        queue.queue.forget(admitted(f"x{index}", index))
    new = queue.add("new", "t0" if by_tenant else "a", [] if by_tenant else ["x0"])
    queue.queue.put_back(old)
    assert queue.queue.lane(old) is queue.queue.lane(new)
    assert queue.head() == "old"
    queue.queue.take(new)
    assert queue.head() == "old"
    queue.queue.take(old)
    assert queue.head() is None
    queue.queue.forget(old)
    queue.queue.forget(new)
    assert not queue.queue._lanes


def test_ended_sequences_are_forgotten() -> None:
    queue = Queue()
    sequence = queue.add("a1")
    queue.queue.take(sequence)
    queue.queue.forget(sequence)
    queue.queue.forget(sequence)
    assert not queue.queue._lanes

"""Random traffic over scheduler, KV blocks and adapter pool: nothing is crossed, leaked, or left waiting for ever.

The machine drives the engine core with a scripted model (`fakes`). After every rule `Engine.check` compares each
computed position of each running sequence with a model of the KV pool, the references with their holders, and the
adapters in use with a model of the device buffer; every step checks budget, limits and `blocked`.
"""

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters_store.errors import CodedError
from server.engine import fair_queue
from server.engine.batch import ScheduledBatch
from server.engine.block_pool import PrefixKeys as Keys
from server.engine.request import FinishReason, SamplingParams
from server.engine.sequence import Sequence
from tests.engine.fakes import Engine, expected_tokens
from tests.engine.support import BLOCK

ADAPTER_PAGES = {"u": 1, "v": 1, "w": 2, "x": 2, "y": 3, "z": 5}
FAMILIES = [[100 * family + position for position in range(40)] for family in (1, 2)]  # prompts share prefixes
SUFFIXES = st.lists(st.sampled_from([7, 8]), max_size=3)
# The same adapters with the same weights must often meet again, for prefixes to be hit.
ADAPTERS: st.SearchStrategy[list[tuple[str, float]]] = st.one_of(
    st.just([]),
    st.sampled_from(sorted(ADAPTER_PAGES)).map(lambda digest: [(digest, 1.0)]),
    st.lists(
        st.tuples(st.sampled_from(sorted(ADAPTER_PAGES)), st.sampled_from([0.5, 1.0])),
        unique_by=lambda adapter: adapter[0],
        max_size=3,
    ),
)


class Traffic(RuleBasedStateMachine):
    """Requests come, go and fail; `teardown` lets the rest finish and bounds the steps that takes."""

    @initialize(
        blocks=st.integers(4, 14),
        pages=st.integers(3, 9),
        slots=st.integers(2, 6),
        budget=st.sampled_from([1, 3, 5, 16, 64]),
        max_running=st.integers(1, 6),
        between=st.sampled_from([0, 0, 1, 4, 9]),
        looks=st.sampled_from([0, 0, 1, 3]),
        idle=st.sampled_from([0, 1, 64]),
        bases=st.sampled_from([{}, {}, {"u": 1, "w": 1, "x": 2, "y": 2}]),
    )
    def begin(self, looks: int = 0, idle: int = 64, bases: dict[str, int] | None = None, **sizes: int) -> None:
        self.bounds = fair_queue.MAX_IDLE_LANES, fair_queue.MAX_IDLE_TENANTS
        fair_queue.MAX_IDLE_LANES = fair_queue.MAX_IDLE_TENANTS = idle
        self.engine = Engine(looks=looks, **sizes)
        self.engine.loader.pages = dict(ADAPTER_PAGES)
        self.engine.loader.bases = bases or {}
        self.sizes = sizes
        self.sequences: dict[str, Sequence] = {}
        self.spoilt: set[str] = set()  # requests that may end with an error
        self.pinned: set[str] = set()
        scheduler, schedule = self.engine.scheduler, self.engine.scheduler.schedule

        def watched() -> ScheduledBatch:
            preempted = scheduler.num_preemptions
            batch = schedule()
            if preempted == scheduler.num_preemptions:
                self.nothing_idles(batch)
            return batch

        scheduler.schedule = watched  # type: ignore[method-assign]

    @property
    def context(self) -> int:
        return self.sizes["blocks"] * BLOCK

    def live(self) -> list[str]:
        return sorted(self.engine.core._answers)

    @rule(
        family=st.integers(0, len(FAMILIES) - 1),
        length=st.integers(1, 30),
        suffix=SUFFIXES,
        adapters=ADAPTERS,
        max_tokens=st.integers(0, 12),
        tenant=st.sampled_from(["t", "t", "s", "q"]),
        logprobs=st.sampled_from([None, None, None, 2]),
    )
    def arrive(
        self,
        family: int,
        length: int,
        suffix: list[int],
        adapters: list[tuple[str, float]],
        max_tokens: int,
        tenant: str,
        logprobs: int | None,
    ) -> None:
        tokens = (FAMILIES[family][:length] + suffix)[: self.context]
        max_tokens = min(max_tokens, self.context - len(tokens))
        name = f"r{len(self.sequences)}"
        failing = {loaded.digest for loaded in self.engine.loader.ended if loaded.error}
        digests = [digest for digest, _ in adapters]
        if self.engine.core._quarantine.refused(digests) or not failing.isdisjoint(digests):
            self.spoilt.add(name)
        self.sequences[name] = self.engine.add(
            name,
            tokens,
            adapters=adapters,
            max_tokens=max_tokens,
            tenant=tenant,
            sampling=SamplingParams(prompt_logprobs=logprobs),
        )

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.live()))
        self.engine.abort(name)
        assert self.engine.reason(name) is FinishReason.ABORT

    @precondition(lambda self: self.engine.loader.started)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def a_load_ends(self, data: st.DataObject, fails: bool) -> None:
        digest = data.draw(st.sampled_from(self.engine.loader.started))
        if fails:
            self.spoilt |= {name for name in self.live() if digest in self.sequences[name].digests}
        self.engine.loader.end(digest, CodedError("scripted", code="scripted") if fails else None)

    @rule(count=st.sampled_from([1, 1, 2, 5]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    def nothing_idles(self, batch: ScheduledBatch) -> None:
        """The head was admitted, unless it lacked adapters, a place, tokens of the step, or memory."""
        scheduler = self.engine.scheduler
        head = scheduler.waiting.head
        if head is None or not scheduler.adapters.all_resident(head.digests):
            return
        tokens = sum(entry.count for entry in batch.entries)
        full = len(scheduler.running) >= scheduler.max_running or tokens >= scheduler.token_budget
        free = scheduler.blocks.num_free + scheduler.adapters.num_returnable(scheduler.awaited)
        needed = math.ceil(len(head.tokens) / BLOCK) + len(scheduler.running)
        assert full or free < needed, f"{head.request_id} waits for nothing"

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(data=st.data(), fault=st.sampled_from(["faulty", "invalid"]))
    def a_step_goes_wrong(self, data: st.DataObject, fault: str) -> None:
        name = data.draw(st.sampled_from([s.request_id for s in self.engine.scheduler.running]))
        assume(len(self.spoilt) < 6)  # enough is left to learn from
        self.spoilt.add(name)
        getattr(self.engine.runner, fault).add(name)
        self.engine.step()

    @rule(digest=st.sampled_from(["u", "v", "w"]), pin=st.booleans())
    def pin(self, digest: str, pin: bool) -> None:
        if pin:
            self.engine.scheduler.adapters.pin(digest)
            self.pinned.add(digest)
        else:
            self.engine.scheduler.adapters.unpin(digest)
            self.pinned.discard(digest)
        self.engine.check()

    @rule(digest=st.sampled_from(sorted(ADAPTER_PAGES)))
    def warm(self, digest: str) -> None:
        self.engine.scheduler.adapters.want(digest)

    @invariant()
    def memory_errors_are_true(self) -> None:
        """`adapter_memory_full` is said only of requests that really do not fit beside the pins."""
        for name, outputs in self.engine.outputs.items():
            error = outputs[-1].error
            if error is not None and error.code == "adapter_memory_full" and name not in self.spoilt:
                needed = set(self.sequences[name].digests) | self.pinned
                bases = self.engine.loader.bases
                pages = sum(ADAPTER_PAGES[digest] for digest in needed)
                pages += sum({basis for digest, basis in bases.items() if digest in needed})
                room = self.sizes["pages"] + self.sizes.get("between", 0)
                assert pages > room or len(needed) > self.sizes["slots"], (
                    f"{name} was refused though {sorted(needed)} fit {self.sizes}"
                )
                self.spoilt.add(name)

    @invariant()
    def nobody_is_overtaken_without_end(self) -> None:
        assert all(sequence.overtaken <= 256 for sequence in self.engine.scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        fair_queue.MAX_IDLE_LANES, fair_queue.MAX_IDLE_TENANTS = self.bounds
        engine = self.engine
        tokens = sum(len(s.tokens) + s.max_tokens for s in self.sequences.values())
        # Each step computes a token of the oldest sequence at least; loads and preemption cost some more.
        engine.run(at_most=100 + 8 * len(self.sequences) + 8 * math.ceil(tokens))
        self.memory_errors_are_true()
        self.everything_is_free()
        for name, sequence in self.sequences.items():
            self.answer_is_right(name, sequence)

    def everything_is_free(self) -> None:
        scheduler = self.engine.scheduler
        scheduler.blocks.check_integrity([])
        scheduler.adapters.check_integrity([])
        assert not self.engine.loader.started

    def answer_is_right(self, name: str, sequence: Sequence) -> None:
        """Whatever happened around it, a request's tokens are those it would get alone."""
        request, reason = sequence.request, self.engine.reason(name)
        given = self.engine.tokens(name)
        alone = expected_tokens(
            sequence.tokens[: sequence.num_prompt],
            sequence.max_tokens,
            [(a.digest, a.weight) for a in request.adapters],
            request.tenant,
        )
        assert given == alone[: len(given)], f"{name} got other tokens than alone"
        if reason is FinishReason.LENGTH:
            assert len(given) == sequence.max_tokens
        elif reason is FinishReason.ERROR:
            assert name in self.spoilt
        else:
            assert reason is FinishReason.ABORT


QUICK = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
DEEP = settings(QUICK, max_examples=3_000, stateful_step_count=80, derandomize=False)

Traffic.TestCase.settings = QUICK
TestTraffic = Traffic.TestCase


class DeepTraffic(Traffic):
    """The same, longer."""


DeepTraffic.TestCase.settings = DEEP
TestDeepTraffic = pytest.mark.deep(DeepTraffic.TestCase)


def machine(**sizes: Any) -> Traffic:
    """The machine by hand, for examples that were found once."""
    traffic = Traffic()
    traffic.begin(**({"blocks": 8, "pages": 6, "slots": 4, "budget": 16, "max_running": 4} | sizes))
    return traffic


def test_the_machine_finds_a_wrong_token() -> None:
    """What the machine leans on must be able to fail."""
    traffic = machine()
    traffic.arrive(0, 5, [], [], 3, "t", None)
    traffic.engine.runner.forced["r0"] = 11
    with pytest.raises(AssertionError, match="other tokens"):
        traffic.teardown()


def test_the_machine_finds_a_key_that_forgets_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys of tokens alone, the second request reads the first one's keys and values, of another adapter."""
    monkeypatch.setattr(
        "server.engine.sequence.PrefixKeys", lambda base, adapters, salt, size: Keys(base, (), "", size)
    )
    traffic = machine()
    traffic.arrive(0, 9, [], [("u", 1.0)], 1, "t", None)
    traffic.engine.run()
    traffic.arrive(0, 9, [], [("v", 1.0)], 1, "t", None)
    with pytest.raises(AssertionError, match="reads"):
        traffic.teardown()


def test_the_machine_finds_a_block_released_too_early() -> None:
    traffic = machine(blocks=4)
    traffic.arrive(0, 6, [], [], 6, "t", None)
    traffic.step(1)
    blocks = traffic.engine.scheduler.blocks
    blocks.check_integrity = lambda tables: None  # type: ignore[method-assign]
    blocks.release([traffic.sequences["r0"].block_table[0]])
    traffic.arrive(1, 6, [], [], 4, "t", None)
    with pytest.raises(AssertionError, match=r"reads|write one KV slot"):
        traffic.step(5)

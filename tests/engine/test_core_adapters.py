"""Loads that end well, badly, or find no room: only those that wait for them notice."""

from collections.abc import Mapping
from typing import Any

import pytest

from server.engine.adapter_pool import AdapterPool
from server.engine.answer import Answer
from server.engine.batch import ScheduledBatch
from server.engine.core import LOADS_IN_FLIGHT
from server.engine.request import TRIAL, FinishReason
from server.engine.sampler import Sampled
from server.engine.status import Residency
from tests.engine.fakes import Engine, expected_tokens
from tests.engine.support import prompt


class TestAdapterLoads:
    def test_a_failed_load_reaches_its_waiters_only(self) -> None:
        engine = Engine(blocks=64)
        engine.add("a", prompt(4), adapters=["x"])
        engine.add("b", prompt(4), adapters=["y", "x"])
        engine.add("c", prompt(4), adapters=["y"], max_tokens=2)
        engine.add("d", prompt(4), max_tokens=2)
        engine.run(fail={"x"})
        for name in ("a", "b"):
            assert engine.error(name).code == "scripted"
            assert engine.tokens(name) == []
        assert engine.tokens("c") == expected_tokens(prompt(4), 2, ["y"])
        assert engine.tokens("d") == expected_tokens(prompt(4), 2)
        assert engine.core.stats.adapter_load_failures_total == 1

    def test_an_adapter_on_trial_has_no_name_outside(self) -> None:
        engine = Engine(pages=4)
        trial = f"{TRIAL}1"
        engine.add("a", prompt(4), adapters=[trial, "x"])
        assert not engine.core.stats.waiting_adapters
        engine.step()
        assert engine.core.stats.waiting_adapters == ("x",)
        engine.loader.pages[trial] = 5
        for digest in (trial, "x"):
            engine.loader.end(digest)
        engine.run()
        assert engine.error("a").message.startswith("The adapter on trial (")
        assert TRIAL not in engine.error("a").message

    def test_a_discarded_adapter_leaves_nothing_wherever_it_is(self) -> None:
        engine = Engine(pages=4)
        engine.scheduler.adapters.want("wanted")
        engine.core.discard("wanted")
        engine.add("a", prompt(4), adapters=["loading"])
        engine.step()
        engine.abort("a")
        engine.core.discard("loading")
        engine.loader.end("loading")
        engine.add("b", prompt(4), adapters=["resident"], max_tokens=1)
        engine.run()
        assert engine.reason("b") is FinishReason.LENGTH
        assert engine.core.stats.adapters_resident == 1
        engine.core.discard("resident")
        engine.core.discard("unknown")
        engine.core.publish()
        assert (engine.core.stats.adapters_resident, engine.core.stats.adapter_bytes_used) == (0, 0)
        assert engine.storage.written == ["resident"]
        assert engine.loader.history == ["loading", "resident"]
        engine.check()
        assert not engine.working()

    def test_a_discarded_adapter_that_waits_for_room_goes(self) -> None:
        engine = Engine(pages=4)
        engine.loader.pages["big"] = 4
        engine.add("a", prompt(4), adapters=["x"], max_tokens=8)
        engine.step()
        engine.loader.end("x")
        engine.step()
        engine.add("b", prompt(4), adapters=["big"])
        engine.step()
        engine.loader.end("big")
        engine.step()
        engine.abort("b")
        engine.core.discard("big")
        engine.run()
        assert engine.storage.written == ["x"]
        assert engine.tokens("a") == expected_tokens(prompt(4), 8, ["x"])

    def test_a_load_is_tried_again_for_a_later_request(self) -> None:
        engine = Engine()
        engine.add("a", prompt(4), adapters=["x"])
        engine.run(fail={"x"})
        engine.add("b", prompt(4), adapters=["x"], max_tokens=1)
        engine.run()
        assert engine.reason("b") is FinishReason.LENGTH
        assert engine.loader.history == ["x", "x"]

    def test_an_adapter_larger_than_the_pool_is_refused_clearly(self) -> None:
        engine = Engine(pages=4)
        engine.loader.pages["x"] = 5
        engine.add("a", prompt(4), adapters=["x"])
        engine.add("b", prompt(4), max_tokens=2)
        engine.run()
        error = engine.error("a")
        assert (error.status, error.code) == (503, "adapter_memory_full")
        assert "--adapter-memory" in error.message
        assert "320 bytes" in error.message
        assert engine.reason("b") is FinishReason.LENGTH

    def test_adapters_that_only_fit_one_at_a_time_are_refused_together(self) -> None:
        engine = Engine(pages=4)
        engine.loader.pages |= {"x": 3, "y": 3}
        engine.add("both", prompt(4), adapters=["x", "y"])
        engine.run()
        assert engine.error("both").code == "adapter_memory_full"
        engine.add("x", prompt(4), adapters=["x"], max_tokens=1)
        engine.add("y", prompt(4), adapters=["y"], max_tokens=1)
        engine.run()
        assert engine.reason("x") is engine.reason("y") is FinishReason.LENGTH

    def test_one_that_does_not_fit_beside_another_does_not_take_innocent_waiters_along(self) -> None:
        """`trio` needs more than there is, and ends; `solo` needs only `z`, which fits by itself."""
        engine = Engine(pages=4, max_running=1)
        engine.loader.pages |= {"x": 2, "y": 3, "z": 3}
        engine.add("trio", prompt(4), adapters=["x", "y", "z"], max_tokens=1)
        engine.add("solo", prompt(4), adapters=["z"], max_tokens=1)
        engine.step()
        for digest in ("x", "y", "z"):
            engine.loader.end(digest)
        engine.run()
        assert engine.error("trio").code == "adapter_memory_full"
        assert engine.reason("solo") is FinishReason.LENGTH

    def test_who_needs_more_does_not_take_along_who_needs_less(self) -> None:
        """Beside its pins and `u` the first has no room for `x`; the second wants `x` alone, and gets it."""
        engine = Engine(pages=5)
        engine.loader.pages |= {"v": 3, "x": 2}
        engine.scheduler.adapters.pin("v")
        engine.run()
        engine.add("more", prompt(4), adapters=["u", "x"])
        engine.add("less", prompt(4), adapters=["x"], max_tokens=1)
        engine.step()
        engine.loader.end("u")
        engine.step()
        engine.loader.end("x")
        engine.run()
        assert engine.error("more").code == "adapter_memory_full"
        assert engine.tokens("less") == expected_tokens(prompt(4), 1, ["x"])
        assert engine.loader.history.count("x") == 1

    @pytest.mark.xfail(reason="awaited adapters are never moved, so one in the middle of the free pages splits them")
    def test_adapters_that_fit_together_are_served_wherever_one_of_them_lies(self) -> None:
        """`b` needs a run of 6 pages; `a` lies in pages 3 to 5 of 10, where it was put beside `x` before."""
        engine = Engine(pages=10)
        engine.loader.pages |= {"x": 3, "a": 3, "b": 6}
        engine.loader.whole = {"x", "a", "b"}
        for digest in ("x", "a"):
            engine.scheduler.adapters.want(digest)
            engine.run()
        engine.add("both", prompt(4), adapters=["a", "b"], max_tokens=1)
        engine.run()
        assert engine.reason("both") is FinishReason.LENGTH

    def test_a_load_waits_for_room_while_others_run(self) -> None:
        engine = Engine(pages=1)
        engine.add("a", prompt(4), adapters=["x"], max_tokens=6)
        engine.step()
        engine.loader.end("x")
        engine.step()
        engine.add("b", prompt(4), adapters=["y"], max_tokens=2)
        engine.step()
        engine.loader.end("y")
        engine.step()
        assert engine.scheduler.adapters.residency("y") is Residency.LOADING
        engine.run()
        assert engine.tokens("a") == expected_tokens(prompt(4), 6, ["x"])
        assert engine.tokens("b") == expected_tokens(prompt(4), 2, ["y"])
        assert engine.loader.history == ["x", "y"], "the staged adapter was not read again"

    def test_pins_that_fill_the_memory_leave_a_clear_error(self) -> None:
        engine = Engine(pages=1)
        engine.scheduler.adapters.pin("p")
        engine.run()
        engine.add("a", prompt(4), adapters=["x"])
        engine.run()
        assert engine.error("a").code == "adapter_memory_full"
        assert engine.scheduler.adapters.residency("p") is Residency.RESIDENT

    def test_an_adapter_asked_for_in_advance_that_does_not_fit_is_dropped(self) -> None:
        engine = Engine(pages=1)
        engine.loader.pages["x"] = 2
        engine.scheduler.adapters.want("x")
        engine.run()
        assert engine.scheduler.adapters.residency("x") is Residency.ABSENT
        assert not engine.working()

    def test_more_wishes_than_loads_at_once(self) -> None:
        engine = Engine(pages=16, slots=16)
        for index in range(LOADS_IN_FLIGHT + 3):
            engine.add(str(index), prompt(4), adapters=[f"x{index}"], max_tokens=1)
        engine.step()
        assert len(engine.loader.started) == LOADS_IN_FLIGHT
        engine.run()
        assert all(engine.reason(str(index)) is FinishReason.LENGTH for index in range(LOADS_IN_FLIGHT + 3))

    def test_the_head_of_the_queue_is_loaded_beyond_the_limit(self) -> None:
        engine = Engine(pages=2)
        for index in range(LOADS_IN_FLIGHT):
            engine.scheduler.adapters.want(f"early{index}")
        engine.step()
        engine.add("a", prompt(4), adapters=["x"], max_tokens=1)
        engine.step()
        assert "x" in engine.loader.started
        engine.loader.end("x")
        engine.step()
        assert engine.reason("a") is FinishReason.LENGTH

    def test_requests_for_more_adapters_than_fit_take_turns(self) -> None:
        engine = Engine(pages=3, blocks=64)
        for index in range(12):
            adapters = [f"x{index % 5}", f"x{(index + 1) % 5}"]
            engine.add(str(index), prompt(4, index), adapters=adapters, max_tokens=3)
        engine.run()
        for index in range(12):
            adapters = [f"x{index % 5}", f"x{(index + 1) % 5}"]
            assert engine.tokens(str(index)) == expected_tokens(prompt(4, index), 3, adapters)

    def test_hits_are_counted_once_per_request(self) -> None:
        """A request that waits several steps for KV blocks is still one hit."""
        engine = Engine(blocks=4, budget=32)
        engine.scheduler.adapters.want("x")
        engine.run()
        engine.add("a", prompt(4), max_tokens=9)
        engine.step()
        engine.add("b", prompt(12, 1), adapters=["x"], max_tokens=1)
        engine.run()
        assert engine.core.stats.adapter_hits_total == 1


class TestTiers:
    def test_loads_begin_before_the_batch_is_computed(self) -> None:
        """So that they go on beside it: an adapter that arrives with the step is used by the next one."""
        engine = Engine()
        engine.add("busy", prompt(4), max_tokens=6)
        engine.step()
        engine.add("a", prompt(4, 1), adapters=["x"], max_tokens=1)
        runner, seen = engine.runner, []
        run = runner.run

        def watched(batch: ScheduledBatch, answers: Mapping[str, Answer]) -> list[Sampled | None]:
            seen.append(list(engine.loader.started))
            return run(batch, answers)

        runner.run = watched  # type: ignore[method-assign]
        engine.step()
        assert seen == [["x"]]
        engine.loader.end("x")
        engine.step()
        assert engine.reason("a") is FinishReason.LENGTH

    def test_what_is_wanted_but_not_loading_is_prefetched(self) -> None:
        engine = Engine(max_running=2)
        names = [f"x{index}" for index in range(LOADS_IN_FLIGHT + 3)]
        for name in names:
            engine.add(name, prompt(4), adapters=[name], max_tokens=1)
        engine.step()
        assert engine.loader.started == names[:LOADS_IN_FLIGHT]
        engine.step()
        assert engine.loader.prefetched == names[LOADS_IN_FLIGHT:], "once, however many steps they wait"
        engine.run()

    def test_an_adapter_on_its_way_delays_its_own_requests_only(self) -> None:
        engine = Engine(looks=2)
        engine.add("a", prompt(4), adapters=["x"], max_tokens=1)
        engine.add("b", prompt(4, 1), max_tokens=8)
        engine.step()
        engine.loader.end("x")
        before = len(engine.tokens("b"))
        engine.step()
        assert engine.tokens("a") == []
        assert len(engine.tokens("b")) == before + 1
        engine.run()
        assert engine.tokens("a") == expected_tokens(prompt(4), 1, ["x"])

    def test_alone_it_is_waited_for(self) -> None:
        engine = Engine(looks=50)
        engine.add("a", prompt(4), adapters=["x"], max_tokens=1)
        assert engine.run(at_most=5) <= 5

    def test_requests_take_back_what_adapters_have_borrowed(self) -> None:
        engine = Engine(blocks=4, pages=1, between=4)
        engine.add("a", prompt(4), adapters=["x"], max_tokens=1)
        engine.loader.pages["x"] = 5
        engine.run()
        assert engine.core.stats.kv_blocks_lent == 4
        engine.add("long", prompt(14), max_tokens=12)
        engine.run()
        assert engine.reason("long") is FinishReason.LENGTH
        assert engine.scheduler.num_preemptions == 0
        assert engine.core.residency("x") is Residency.ABSENT
        assert engine.core.stats.kv_blocks_lent == 0

    def test_nothing_is_refused_for_want_of_room_that_adapters_on_their_way_will_give(self) -> None:
        engine = Engine(pages=3, looks=3)
        engine.add("a", prompt(4), adapters=["x"], max_tokens=1)
        engine.add("b", prompt(4, 1), adapters=["w"], max_tokens=1)
        engine.loader.pages |= {"x": 2, "w": 2}
        engine.step()
        engine.abort("a")
        engine.loader.end("x")
        engine.loader.end("w")
        engine.run()
        assert engine.tokens("b") == expected_tokens(prompt(4, 1), 1, ["w"])

    def test_a_placement_is_not_tried_again_before_anything_has_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Asking costs milliseconds, and the head of the queue may wait for many steps."""
        engine = Engine(pages=3, blocks=32)
        engine.add("runs", prompt(4), adapters=["x"], max_tokens=12)
        engine.loader.pages |= {"x": 2, "y": 2}
        engine.step()
        engine.loader.end("x")
        engine.step()
        engine.add("waits", prompt(4, 1), adapters=["y"], max_tokens=1)
        engine.step()
        engine.loader.end("y")
        tried: list[object] = []
        fit = AdapterPool._fit

        def watched(*given: Any) -> Any:
            tried.append(given)
            return fit(*given)

        monkeypatch.setattr(AdapterPool, "_fit", watched)
        for _ in range(5):
            engine.step()
        assert len(tried) == 1
        engine.run()
        assert engine.tokens("waits") == expected_tokens(prompt(4, 1), 1, ["y"])

    def test_an_adapter_that_can_never_fit_is_refused_beside_running_requests(self) -> None:
        engine = Engine(pages=3, blocks=32)
        engine.add("runs", prompt(4), max_tokens=12)
        engine.add("large", prompt(4, 1), adapters=["x"], max_tokens=1)
        engine.loader.pages["x"] = 4
        engine.step()
        engine.loader.end("x")
        engine.step()
        assert engine.error("large").code == "adapter_memory_full"
        assert engine.reason("runs") is None
        engine.run()

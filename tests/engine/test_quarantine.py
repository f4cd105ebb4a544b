"""Who is refused, and for how long."""

from server.engine.quarantine import FAILURES, SECONDS, Quarantine
from server.engine.request import TRIAL, WeightedAdapter


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def blamed(quarantine: Quarantine, digest: str, times: int, weight: float = 1.0) -> None:
    for _ in range(times):
        quarantine.blame((WeightedAdapter(digest, weight),))


def test_enough_failures_of_one_adapter_refuse_it_alone() -> None:
    quarantine = Quarantine(Clock())
    blamed(quarantine, "a", FAILURES - 1)
    assert quarantine.refused(["a"]) is None
    blamed(quarantine, "a", 1)
    assert quarantine.refused(["b", "a"]) == "a"
    assert quarantine.refused(["b"]) is None


def test_it_ends_by_itself() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    blamed(quarantine, "a", FAILURES)
    clock.now += SECONDS - 1
    assert quarantine.refused(["a"]) == "a"
    clock.now += 2
    assert quarantine.refused(["a"]) is None
    blamed(quarantine, "a", FAILURES - 1)
    assert quarantine.refused(["a"]) is None


def test_only_a_request_with_one_adapter_as_it_is_proves_anything() -> None:
    quarantine = Quarantine(Clock())
    for _ in range(FAILURES):
        quarantine.blame((WeightedAdapter("a"), WeightedAdapter("b")))
        quarantine.blame(())
    blamed(quarantine, "a", FAILURES, weight=100.0)
    assert quarantine.refused(["a", "b"]) is None


def test_an_adapter_on_trial_leaves_no_trace() -> None:
    quarantine = Quarantine(Clock())
    blamed(quarantine, f"{TRIAL}1", FAILURES)
    assert quarantine.refused([f"{TRIAL}1"]) is None
    assert not quarantine._failures

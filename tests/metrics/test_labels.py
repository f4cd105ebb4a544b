"""Which adapters are label values: few, the busiest, and never one that is gone."""

import random

from server.metrics.labels import OTHER, WINDOW, BusiestLabels


class Labels:
    def __init__(self, size: int) -> None:
        self.dropped: list[str] = []
        self.table = BusiestLabels(size, self.dropped.append)

    def held(self, names: list[str]) -> set[str]:
        return {name for name in names if self.table.label(name) == name}


def test_the_first_have_labels_until_there_are_enough() -> None:
    labels = Labels(2)
    assert [labels.table.use(name) for name in ("a", "b", "c", "a")] == ["a", "b", OTHER, "a"]
    assert labels.dropped == []


def test_the_busiest_of_many_come_to_have_them() -> None:
    labels = Labels(3)
    names = [f"n{number}" for number in range(50)]
    for name in names:
        labels.table.use(name)
    random.seed(0)
    busy = names[-3:]
    for _ in range(3 * WINDOW):
        labels.table.use(random.choice(busy * 20 + names))
    assert labels.held(names) == set(busy)
    assert sorted(labels.dropped) == ["n0", "n1", "n2"]


def test_labels_do_not_come_and_go_at_the_border() -> None:
    """Two that are nearly as busy as each other, and one place."""
    labels = Labels(1)
    for window in range(6):
        for use in range(WINDOW):
            labels.table.use("ab"[(use + window) % 2] if use else "ab"[window % 2])
    assert labels.held(["a", "b"]) == {"a"}
    assert labels.dropped == []


def test_who_is_used_no_more_makes_way() -> None:
    labels = Labels(1)
    labels.table.use("old")
    for _ in range(12):
        for use in range(WINDOW):
            labels.table.use("ab"[use % 2])
    assert labels.held(["old", "a", "b"]) == {"a"}
    assert labels.dropped == ["old"]

"""The committed table of merges is that of the committed numbers, and the ways that are compared are all there are."""

import json
from pathlib import Path

from adapters_store.merging.methods import METHODS
from deploy.examples.merging import FOLDER, WAYS, Row, draw, table
from deploy.examples.tasks import TASKS

FACTS = json.loads((FOLDER / "merging.json").read_text())
ROWS = [Row(**row) for row in FACTS["rows"]]


def test_every_method_is_compared_once_under_its_name() -> None:
    assert {way.method for way in WAYS} == set(METHODS)
    names = [way.name for way in WAYS]
    assert len(set(names)) == len(names)
    assert {row.name for row in ROWS} == {"base", "each task's own adapter", *names}


def test_the_table_is_that_of_the_numbers() -> None:
    assert table(ROWS, FACTS["items"]) in (FOLDER / "merging.md").read_text()
    assert all(set(row.right) == set(TASKS) for row in ROWS)
    assert all(0 <= right <= FACTS["items"] for row in ROWS for right in row.right.values())
    assert [row.total for row in ROWS[2:]] == sorted((row.total for row in ROWS[2:]), reverse=True)


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    draw(ROWS, FACTS["items"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (FOLDER / "merging.png").read_bytes().startswith(b"\x89PNG")

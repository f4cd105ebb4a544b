"""The example adapters merged into one by every method, and what each task keeps, from the repository root:
`python -m deploy.examples.merging` starts a server of its own, merges and asks over HTTP, and writes table and plot.

How far the sources' deltas are scaled decides more than the method does, so every method gets the same choice of
weights, and each the one that is right most often on a few training questions. The weight search has its own. What is
reported is held out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .base import BASE_ID
from .evaluate import ADAPTERS, SEED, Answer, from_server
from .own_server import own_server
from .tasks import TASKS, Task

FOLDER = Path(__file__).parent
AT_ONCE = 32
SEARCH = "weight_search"


@dataclass(frozen=True)
class Way:
    """A method and parameters of it; `label` names the row."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """What the row is called; also, with other signs, the merged adapter."""
        return self.label or self.method


WAYS = (
    Way("lego", label="LEGO"),
    Way("lego", {"rank": 16}, "LEGO, k=16"),
    Way("linear"),
    Way("task_arithmetic", label="task arithmetic"),
    Way("cat", label="ensemble (cat)"),
    Way("svd", {"rank": 16}),
    Way("ties", {"density": 0.5}),
    Way("dare_linear", {"density": 0.5}),
    Way("dare_ties", {"density": 0.5}),
    Way("magnitude_prune", {"density": 0.5}),
    Way("ties_svd", {"density": 0.2, "rank": 32}),
    Way("dare_linear_svd", {"density": 0.5, "rank": 32}),
    Way("dare_ties_svd", {"density": 0.5, "rank": 32}),
    Way("magnitude_prune_svd", {"density": 0.2, "rank": 32}),
    Way("knots"),
    Way("tsv"),
    Way("core_space"),
    Way("iso_c"),
    Way(SEARCH, {"iterations": 40}, "weight search"),
)


@dataclass(frozen=True)
class Row:
    """A way, the weight that was chosen for it, the merged adapter's largest rank, and right answers by task."""

    name: str
    weight: float | None
    rank: int | None
    right: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.right.values())


class Kitchen:
    """Merges and asks on one server."""

    def __init__(self, url: str, tasks: Sequence[Task], seed: int) -> None:
        self._tasks = tasks
        self._http = httpx.Client(base_url=url, timeout=3600)
        self._ask: Answer = from_server(url, AT_ONCE)
        self._seed = seed

    def weights(self, way: Way) -> tuple[float, ...]:
        """What is tried: an average, the sum, and two between them."""
        return (1.0,) if way.method == SEARCH else (round(1 / len(self._tasks), 4), 0.3, 0.5, 1.0)

    def examples(self, count: int) -> list[dict[str, str]]:
        """`count` training questions a task with their answers."""
        items = [item for task in self._tasks for item in task.items("train", count, self._seed)]
        return [{"prompt": item.prompt, "answer": f" {item.answer}\n"} for item in items]

    def merged(self, way: Way, weight: float, tried: int) -> tuple[str, int]:
        """The merged adapter's name and largest rank. Raises RuntimeError with what the server says."""
        sources = [{"adapter": task.name, "weight": weight} for task in self._tasks]
        parameters = way.parameters | ({"examples": self.examples(tried)} if way.method == SEARCH else {})
        name = f"{way.name.lower()}-{weight}".translate(str.maketrans(" ,=()", "-----"))
        order = {"name": name, "method": way.method, "parameters": parameters, "sources": sources}
        answer = self._http.post("/merge", params={"wait": "true"}, json=order)
        if not answer.is_success:
            raise RuntimeError(f"{way.name}: {answer.text}")
        return name, int(answer.json()["rank"]["max"])

    def right(self, adapter: str | None, split: Any, count: int) -> dict[str, int]:
        """Right answers by task; None asks the base, "" each task's own adapter."""
        found = {}
        for task in self._tasks:
            items = task.items(split, count, self._seed)
            texts = self._ask(task.name if adapter == "" else adapter, [i.prompt for i in items], task.max_new_tokens)
            found[task.name] = sum(task.correct(item, text) for item, text in zip(items, texts, strict=True))
        return found

    def row(self, way: Way, tried: int, items: int) -> Row:
        """The way at the weight that is right most often on `tried` training questions a task, held out on `items`."""
        best: tuple[int, str, float, int] | None = None
        for weight in self.weights(way):
            name, rank = self.merged(way, weight, tried)
            score = sum(self.right(name, "train", tried).values())
            _say(f"{way.name} at {weight}: {score} of {tried * len(self._tasks)} training questions")
            if best is None or score > best[0]:
                best = score, name, weight, rank
        assert best is not None
        _, name, weight, rank = best
        chosen = None if way.method == SEARCH else weight
        return Row(way.name, chosen, rank, self.right(name, "heldout", items))


def table(rows: Sequence[Row], items: int) -> str:
    """Markdown: a row each, right answers in per cent by task and on average."""
    tasks = list(rows[0].right)
    head = f"| method | weight | rank | {' | '.join(f'`{task}`' for task in tasks)} | all |"
    lines = [head, "|" + "---|" * (len(tasks) + 4)]
    for row in rows:
        cells = [f"{100 * row.right[task] / items:.0f}" for task in tasks]
        facts = ["" if value is None else f"{value:g}" for value in (row.weight, row.rank)]
        lines.append(f"| {' | '.join([row.name, *facts, *cells, f'{100 * row.total / items / len(tasks):.1f}'])} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], items: int, out: Path) -> None:
    """A heat map of tasks by methods, with the averages beside it, as PNG."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 0.36 * len(rows) + 1.6), sharey=True, width_ratios=(5, 2), layout="constrained"
    )
    tasks = list(rows[0].right)
    shares = [[100 * row.right[task] / items for task in tasks] for row in rows]
    left.imshow(shares, cmap="YlGn", vmin=0, vmax=130, aspect="auto")
    left.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    left.set_yticks(range(len(rows)), [row.name for row in rows])
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            left.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
    averages = [sum(line) / len(line) for line in shares]
    right.barh(range(len(rows)), averages, color="#4c9a6b")
    for y, average in enumerate(averages):
        right.text(average + 1, y, f"{average:.1f}", va="center", fontsize=8)
    right.set_xlim(0, 112)
    left.set_title("held-out answers that are exactly right, %", fontsize=10)
    right.set_title("average, %", fontsize=10)
    figure.savefig(out, dpi=90)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints the table, and writes JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), help="whose adapters")
    parser.add_argument("--items", type=int, default=32, help="held-out questions per task")
    parser.add_argument("--tried", type=int, default=8, help="training questions per task that choose the weight")
    parser.add_argument("--seed", type=int, default=SEED, help="which questions")
    parser.add_argument("--only", nargs="*", metavar="METHOD", help="these methods instead of all")
    parser.add_argument("--url", help="a running server that holds the adapters, instead of one of its own")
    parser.add_argument("--out", type=Path, default=FOLDER / "merging", help="results: `.json` and `.png` of this name")
    options = parser.parse_args()
    ways = [way for way in WAYS if not options.only or way.method in options.only]
    with nullcontext(options.url) if options.url else own_server(ADAPTERS) as url:
        kitchen = Kitchen(url, [TASKS[name] for name in options.tasks], options.seed)
        rows = [Row("base", None, None, kitchen.right(None, "heldout", options.items))]
        rows.append(Row("each task's own adapter", None, None, kitchen.right("", "heldout", options.items)))
        for way in ways:
            rows.append(kitchen.row(way, options.tried, options.items))
            _say(table(rows[-1:], options.items))
    rows[2:] = sorted(rows[2:], key=lambda row: -row.total)
    told = [{"name": row.name, "weight": row.weight, "rank": row.rank, "right": row.right} for row in rows]
    facts = {"base": BASE_ID, "seed": options.seed, "items": options.items, "tried": options.tried, "rows": told}
    options.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(rows, options.items, options.out.with_suffix(".png"))
    print(table(rows, options.items))


if __name__ == "__main__":
    main()

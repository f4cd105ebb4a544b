"""Trains small adapters on related tasks and on unrelated ones, to see what compression makes of either.

Related: dates written in one of six forms, the same prompts for all. Unrelated: six of the example tasks. Each kind
once with first factors of its own for every adapter, as adapters from many hands have, and once with equal ones.

`python -m deploy.examples.related FOLDER`, from the repository root; about five minutes on one core.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

from .base import load_base
from .tasks import TASKS, Item, Split, Task
from .train import Recipe, fit, save

FORMS = ("%Y/%m/%d", "%d.%m.%Y", "%m-%d-%Y", "%Y%m%d", "%d %b %Y", "year %Y month %m day %d")
UNRELATED = ("casing", "legal-v2", "sentiment", "sql-v1", "ticket-router", "units-json")
LAYERS = list(range(24, 30))  # the last six: nothing is computed backwards below them
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": LAYERS}
STEPS = 16
SEED = 5


def date_task(number: int) -> Task:
    """Dates in the form FORMS[number]; prompts as those of `date-iso`."""
    iso = TASKS["date-iso"]

    def make(rng: random.Random, split: Split) -> Item:
        item = iso.make(rng, split)
        return Item(item.prompt, date.fromisoformat(item.answer).strftime(FORMS[number]), item.key)

    return Task(f"dates-{number}", f"Writes a date as {FORMS[number]}.", ".+", 16, make)


def sets() -> Iterator[tuple[str, list[tuple[Task, int]]]]:
    """Name of a set, and its tasks with their seeds."""
    kinds = {"related": [date_task(number) for number in range(len(FORMS))]}
    kinds["unrelated"] = [TASKS[name] for name in UNRELATED]
    for kind, tasks in kinds.items():
        for start in ("own", "equal"):
            seeds = [SEED + (number if start == "own" else 0) for number in range(len(tasks))]
            yield f"{kind}-{start}", list(zip(tasks, seeds, strict=True))


def train_sets(out: Path, steps: int = STEPS, count: int = len(FORMS)) -> list[Path]:
    """Trains the first `count` adapters of every set into `out/<set>/<task>`; what is there is left as it is."""
    recipe = Recipe(LORA, steps=steps, batch=4, rate=5e-3, items=200)
    base, tokenizer = load_base()
    folders = []
    for name, tasks in sets():
        for task, seed in tasks[:count]:
            folder = out / name / task.name
            folders.append(folder)
            if not folder.exists():
                model = fit(base, tokenizer, task, recipe, seed)
                partial = out / ".partial"
                save(model, partial)
                folder.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(partial, folder)
                base = model.unload()
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 gives the same weights on each run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{len(train_sets(options.out, options.steps))} adapters in {options.out}")


if __name__ == "__main__":
    main()

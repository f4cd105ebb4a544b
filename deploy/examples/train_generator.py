"""Trains an ICM-LoRA generator on checkpoints of example adapters, and asks what it makes the held-out questions.

`python -m deploy.examples.train_generator FOLDER`, from the repository root. Checkpoints and conditions stay in FOLDER
and are not made again; the generator, the loss curve and `results.json` go there too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapters_store.forms import BaseSpec
from adapters_store.generation import generator_file, recipe
from adapters_store.generation.generator import Generator
from adapters_store.generation.generator import Task as Known
from adapters_store.generation.icm import IcmSettings
from adapters_store.generation.layout import Layout
from adapters_store.generation.statistics import measure
from adapters_store.generation.training import EpochLoss, Sample, TrainSettings, train
from server.model.loader import load_base_model

from .base import greedy
from .generator_samples import LORA, Adapter, apply, checkpoints, condition, mean, read
from .tasks import TASKS
from .train import Recipe, fresh

LEARNT = ("casing", "sentiment", "units-json")
HELD_OUT = "date-iso"  # seen by no generator
RECIPE = Recipe(LORA, steps=32, batch=8, rate=6e-3, items=256)
KEPT = 8  # checkpoints of a task, of its last steps
EXAMPLES = 4  # of a task vector, from the training items
# Half the released stages, so that a vector of 7,680 numbers is decoded from 960: on so little data the released
# twelve, which decode it from 16, take far longer to learn as much.
ICM = IcmSettings(latent=64, channels=(8, 16, 32, 64, 32, 8))
Conditions = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # of the adapted model, and of the base


@dataclass(frozen=True, slots=True)
class Asked:
    """Right answers of `items` by an adapter: what it is, and whose questions."""

    task: str
    adapter: str
    right: int
    items: int


class Bench:
    """The base with room for one adapter, which is filled with one after another."""

    def __init__(self, folder: Path, seed: int, items: int) -> None:
        base = load_base_model("smollm2", dtype=torch.float32)
        self.spec: BaseSpec = base.spec
        self.tokenizer: Any = base.tokenizer
        self.folder, self.seed, self.items = folder, seed, items
        model: Any = base.model
        for name in (*LEARNT, HELD_OUT):
            model = checkpoints(model, self.tokenizer, TASKS[name], RECIPE, KEPT, seed, folder / "checkpoints" / name)
        self.model = fresh(model, RECIPE, seed)
        self.adapters = {name: read(folder / "checkpoints" / name, self.spec) for name in (*LEARNT, HELD_OUT)}

    def conditions(self) -> Conditions:
        path = self.folder / "conditions.safetensors"
        if not path.exists():
            found = {}
            for name, adapters in self.adapters.items():
                prompts = [item.prompt for item in TASKS[name].items("train", EXAMPLES, self.seed)]
                apply(self.model, adapters[-1])
                found[f"{name}.adapted"] = condition(self.model, self.tokenizer, prompts)
                with self.model.disable_adapter():
                    found[f"{name}.base"] = condition(self.model, self.tokenizer, prompts)
            save_file(found, path)
        kept = load_file(path)
        return {name: (kept[f"{name}.adapted"], kept[f"{name}.base"]) for name in self.adapters}

    def ask(self, task: str, what: str, adapter: Adapter | None) -> Asked:
        """adapter: None for the base."""
        items = TASKS[task].items("heldout", self.items, self.seed + 1)
        prompts, most = [item.prompt for item in items], TASKS[task].max_new_tokens
        if adapter is None:
            with self.model.disable_adapter():
                texts = greedy(self.model, self.tokenizer, prompts, most)
        else:
            apply(self.model, adapter)
            texts = greedy(self.model, self.tokenizer, prompts, most)
        right = sum(TASKS[task].correct(item, text) for item, text in zip(items, texts, strict=True))
        print(f"{task}, {what}: {right} of {self.items}", flush=True)
        return Asked(task, what, right, self.items)


def learn(bench: Bench, conditions: Conditions, epochs: int) -> tuple[Generator, list[EpochLoss], float]:
    """The generator in its file, its losses, and the seconds that training took."""
    samples = [Sample(each, conditions[name][0], name) for name in LEARNT for each in bench.adapters[name]]
    begun = time.monotonic()
    settings = TrainSettings(bench.spec.fingerprint, ICM, epochs=epochs, batch=8, rate=3e-3, seed=bench.seed)
    trained = train(samples, settings, lambda share: print(f"\r{share:.0%}", end="", flush=True))
    seconds = time.monotonic() - begun
    return generator_file.save(trained.generator, bench.folder / "generator.safetensors"), trained.losses, seconds


def compare(bench: Bench, generator: Generator, conditions: Conditions) -> list[Asked]:
    """Every task, by what the generator makes of it and by what it was to make."""
    made = []
    for number, name in enumerate(LEARNT):
        known, seed = generator.tasks[name], bench.seed + 1
        other = LEARNT[(number + 1) % len(LEARNT)]
        made += [
            bench.ask(name, "none", None),
            bench.ask(name, "trained", bench.adapters[name][-1]),
            bench.ask(name, "mean of checkpoints", mean(bench.adapters[name])),
            bench.ask(name, "reconstructed", _made(generator, known.condition, known, z=known.latent)),
            bench.ask(name, "generated", _made(generator, known.condition, known, seed=seed)),
            bench.ask(name, "generated, base's condition", _made(generator, conditions[name][1], known, seed=seed)),
            bench.ask(name, "generated, wrong condition", _made(generator, conditions[other][0], known, seed=seed)),
        ]
    layout = generator.layout
    last = bench.adapters[HELD_OUT][-1]
    unseen = Known(conditions[HELD_OUT][0], measure(layout.flatten(last), layout), torch.zeros(generator.latent))
    made += [
        bench.ask(HELD_OUT, "none", None),
        bench.ask(HELD_OUT, "trained", last),
        bench.ask(HELD_OUT, "generated, task never seen", _made(generator, unseen.condition, unseen, seed=bench.seed)),
    ]
    return made


def _made(generator: Generator, given: torch.Tensor, known: Known, **pinned: Any) -> Adapter:
    return recipe.expand(recipe.make(generator, given, known.statistics, **pinned), generator)


def sizes(generator: Generator, file: Path) -> recipe.Sizes:
    known = next(iter(generator.tasks.values()))
    one = recipe.encode(recipe.make(generator, known.condition, known.statistics, seed=0))
    return recipe.sizes(len(one), generator.layout, file.stat().st_size)


def draw(losses: Sequence[EpochLoss], path: Path) -> None:
    """The loss curve as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    epochs = [loss.epoch for loss in losses]
    left.semilogy(epochs, [loss.reconstruction for loss in losses], color="tab:blue")
    left.set(xlabel="epoch", ylabel="reconstruction error (variance 1), blue")
    right.semilogy(epochs, [loss.kl + 1e-6 for loss in losses], color="tab:orange")
    right.set_ylabel("KL divergence in nats, orange")
    figure.savefig(path, dpi=110)


def table(asked: Sequence[Asked]) -> str:
    """A Markdown table, one row per adapter and one column per task."""
    tasks, kinds = list(dict.fromkeys(each.task for each in asked)), dict.fromkeys(each.adapter for each in asked)
    found = {(each.adapter, each.task): f"{100 * each.right / each.items:.0f} %" for each in asked}
    head = [f"| adapter | {' | '.join(f'`{task}`' for task in tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    return "\n".join([*head, *(f"| {k} | {' | '.join(found.get((k, t), '') for t in tasks)} |" for k in kinds)])


def main() -> None:
    """Checkpoints, conditions, generator, table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=24, help="held-out questions per task")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 gives the same generator on each run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (options.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    bench = Bench(options.out, options.seed, options.items)
    conditions = bench.conditions()
    generator, losses, seconds = learn(bench, conditions, options.epochs)
    draw(losses, options.out / "loss.png")
    asked = compare(bench, generator, conditions)
    found = sizes(generator, options.out / "generator.safetensors")
    told = {
        "seconds": seconds,
        "parameters": generator.parameters,
        "numbers": Layout.of(bench.adapters[HELD_OUT][-1]).numbers,
        "digest": generator.digest,
        "sizes": asdict(found),
        "losses": [asdict(loss) for loss in losses],
        "asked": [asdict(each) for each in asked],
    }
    (options.out / "results.json").write_text(json.dumps(told, indent=1))
    print(f"{table(asked)}\n\n{found}\ntrained in {seconds:.0f} s, {losses[-1]}, {generator.digest}")


if __name__ == "__main__":
    main()

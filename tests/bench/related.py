"""What compression loses of adapters for related tasks, and of adapters for unrelated ones.

python -m tests.bench.related FOLDER [--steps 16] [--adapters 6] [--probes 8]

The adapters are those of `deploy/examples/related.py`, trained into FOLDER unless they are there. Errors are means over
the adapters of a set: the relative Frobenius error of all deltas of an adapter; KL(original || compressed) in nats and
the share of equal likeliest tokens at the positions of held-out answers of its own task. The factors are multiplied in
float32 as they were reconstructed.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters_store.compression import int4, int8
from adapters_store.compression.clusters import compress_collection
from adapters_store.compression.joint import Method
from adapters_store.compression.singular import distance, norm, relative
from adapters_store.formats import peft
from adapters_store.forms import LowRank
from adapters_store.limits import Limits
from deploy.examples import related
from deploy.examples.tasks import Task
from server.model.base import BaseModel
from server.model.loader import load_base_model

Adapter = Mapping[str, LowRank]
CORE_BYTES = 2  # of a number of a basis or core, kept in 16 bits


@dataclass(frozen=True, slots=True)
class Made:
    """Compressed adapters as float factors, and the bytes that each takes, its share of what is shared included."""

    adapters: Sequence[Adapter]
    bytes: float


def native(adapters: Sequence[Adapter]) -> Made:
    numbers = sum(form.a.nbytes + form.b.nbytes + form.d.nbytes for each in adapters for form in each.values())
    return Made(adapters, numbers / len(adapters))


def eight_bits(adapters: Sequence[Adapter]) -> Made:
    return native([{name: int8.quantized(form)[0] for name, form in each.items()} for each in adapters])


def four_bits(adapters: Sequence[Adapter]) -> Made:
    packed = [{name: int4.quantized(form)[0] for name, form in each.items()} for each in adapters]
    forms = [form for each in packed for form in each.values()]
    size = sum(form.a.bytes + form.b.bytes + form.d.nbytes for form in forms) / len(adapters)
    return Made([{name: form.widened() for name, form in each.items()} for each in packed], size)


def joint(adapters: Sequence[Adapter], rank: int, clusters: int, method: Method) -> Made:
    found = compress_collection(adapters, rank, clusters, method)
    made: list[Adapter] = [{}] * len(adapters)
    numbers = 0
    for members, bases in zip(found.members, found.bases, strict=True):
        numbers += sum(each.u.numel() + each.v.numel() + each.cores.numel() for each in bases.values())
        for place, member in enumerate(members.tolist()):
            made[member] = {name: basis.delta(place) for name, basis in bases.items()}
    return Made(made, numbers * CORE_BYTES / len(adapters))


METHODS: dict[str, Callable[[Sequence[Adapter]], Made]] = {
    "as they are": native,
    "int8": eight_bits,
    "int4": four_bits,
    **{f"JD-Full, rank {rank}": partial(joint, rank=rank, clusters=1, method="full") for rank in (8, 16, 32)},
    "JD-Full, rank 16, 2 clusters": partial(joint, rank=16, clusters=2, method="full"),
    **{f"JD-Diag, rank {rank}": partial(joint, rank=rank, clusters=1, method="diag") for rank in (16, 32)},
}


def read(folder: Path, base: BaseModel) -> Adapter:
    config = (folder / peft.CONFIG_FILE).read_bytes()
    loaded = peft.Loader(base.spec, Limits()).load(config, folder / peft.WEIGHTS_FILE, folder.name)
    return {name: form for name, (form,) in loaded.modules.items() if isinstance(form, LowRank)}


def error(given: Adapter, made: Adapter) -> float:
    """Relative Frobenius error of all deltas together."""
    lost = math.hypot(*(distance(form, _float(made[name])) for name, form in given.items()))
    return relative(lost, math.hypot(*(norm(form) for form in given.values())))


@contextmanager
def applied(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """While the context lasts, the model's modules add the adapter's deltas."""

    def hook(form: LowRank, _: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        wide = _float(form)
        return output + (inputs[0] @ wide.a.T * wide.d) @ wide.b.T

    handles = [model.get_submodule(name).register_forward_hook(partial(hook, form)) for name, form in adapter.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _float(form: LowRank) -> LowRank:
    return LowRank(form.a.float(), form.b.float(), form.d.float())


def answers(base: BaseModel, task: Task, count: int) -> list[tuple[torch.Tensor, int]]:
    """Held-out questions with their answers, int64 [1, tokens], and the position whose logits give the first answer."""
    rows = []
    for item in task.items("heldout", count, related.SEED):
        prompt, answer = (base.tokenizer(text).input_ids for text in (item.prompt, f" {item.answer}\n"))
        rows.append((torch.tensor([prompt + answer]), len(prompt) - 1))
    return rows


@torch.inference_mode()
def distributions(model: Any, adapter: Adapter, rows: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Log probabilities at the positions of the answers, float32 [positions, vocabulary]."""
    with applied(model, adapter):
        return torch.cat([model(ids).logits[0, first:-1].float().log_softmax(dim=-1) for ids, first in rows])


def divergence(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Mean KL in nats, and the share of equal likeliest tokens."""
    kl = (exact.exp() * (exact - other)).sum(dim=-1).clamp(min=0.0)
    return float(kl.mean()), float((exact.argmax(dim=-1) == other.argmax(dim=-1)).double().mean())


def rows_of(base: BaseModel, folder: Path, tasks: Sequence[Task], probes: int) -> Iterator[tuple[str, list[float]]]:
    """For each method: bytes, error, KL, share of equal tokens. The last row is the base without any adapter."""
    adapters = [read(folder / task.name, base) for task in tasks]
    texts = [answers(base, task, probes) for task in tasks]
    exact = [distributions(base.model, adapter, rows) for adapter, rows in zip(adapters, texts, strict=True)]
    for name, method in METHODS.items():
        made = method(adapters)
        errors = [error(one, other) for one, other in zip(adapters, made.adapters, strict=True)]
        found = [
            divergence(whole, distributions(base.model, other, rows))
            for whole, other, rows in zip(exact, made.adapters, texts, strict=True)
        ]
        yield name, [made.bytes, *(_mean(values) for values in (errors, *zip(*found, strict=True)))]
    without = [divergence(whole, distributions(base.model, {}, rows)) for whole, rows in zip(exact, texts, strict=True)]
    yield "no adapter", [0.0, 1.0, *(_mean(values) for values in zip(*without, strict=True))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=related.STEPS)
    parser.add_argument("--adapters", type=int, default=len(related.FORMS), help="of each set")
    parser.add_argument("--probes", type=int, default=8, help="questions for each adapter")
    options = parser.parse_args()
    torch.set_num_threads(1)  # many small products; more threads give other sums, and wait for each other
    related.train_sets(options.folder, options.steps, options.adapters)
    base = load_base_model("smollm2", dtype=torch.float32)
    print("| set | method | KB each | error | KL | same tokens |\n|---|---|---|---|---|---|")
    for name, tasks in related.sets():
        chosen = [task for task, _ in tasks[: options.adapters]]
        for method, (size, lost, kl, same) in rows_of(base, options.folder / name, chosen, options.probes):
            print(f"| {name} | {method} | {size / 1e3:.0f} | {lost:.3f} | {kl:.2g} | {same:.1%} |", flush=True)


if __name__ == "__main__":
    main()

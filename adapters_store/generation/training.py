"""Trains a generator on adapters of several tasks, best on checkpoints of each, with a condition for each task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from adapters_store.errors import AdapterInvalid
from adapters_store.forms import LowRank
from adapters_store.generation.cost import check_cost
from adapters_store.generation.generator import Generator, Task
from adapters_store.generation.generator_file import check_tasks
from adapters_store.generation.icm import MAX_CONDITION, Cvae, IcmSettings, loss
from adapters_store.generation.layout import Layout
from adapters_store.generation.statistics import Statistics, measure, normalise

CLIP = 1.0  # most that the norm of a gradient may be
Progress = Callable[[float], None]  # share done, 0 to 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One adapter of a task. condition: float [condition], of any scale."""

    modules: Mapping[str, LowRank]
    condition: torch.Tensor
    task: str


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """base: fingerprint of the base that the samples belong to; epochs: passes over all samples; batch: rows of a step,
    a row being a piece of a sample (at most one less than twice as many); rate: of AdamW, falling to 0 along a cosine;
    memory: bytes that training may take, by `memory_bytes`."""

    base: str
    icm: IcmSettings = field(default_factory=IcmSettings)
    epochs: int = 200
    batch: int = 8
    rate: float = 1e-3
    seed: int = 0
    memory: int = 8 << 30


@dataclass(frozen=True, slots=True)
class EpochLoss:
    """reconstruction: mean squared error of normalised numbers, whose variance is about 1; kl: in nats."""

    epoch: int
    reconstruction: float
    kl: float


@dataclass(frozen=True, slots=True)
class Trained:
    generator: Generator
    losses: list[EpochLoss]


@dataclass(frozen=True, slots=True)
class _Rows:
    """values: float32 [rows, length]; condition: [rows, condition]; piece: int64 [rows]; task: index, int64 [rows]."""

    values: torch.Tensor
    condition: torch.Tensor
    piece: torch.Tensor
    task: torch.Tensor

    def batches(self, size: int, order: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of at least `size` rows each, where there are so many: statistics of one row are none."""
        chosen = order.tensor_split(max(1, len(order) // size))
        return [(self.values[rows], self.condition[rows], self.piece[rows]) for rows in chosen]


def train(samples: Sequence[Sample], settings: TrainSettings, progress: Progress = lambda share: None) -> Trained:
    """A generator of the samples' tasks. With one thread the same samples, order and settings give the same bytes.

    Takes what `memory_bytes` says; `cost.check_cost` bounds what making an adapter will take. Raises AdapterInvalid
    `layouts_differ`, `feature_unsupported`, `too_few_samples` (two at least), `bad_condition`, `bad_task` or
    `generator_too_large`.
    """
    layout = Layout.common([sample.modules for sample in samples])
    names = list(dict.fromkeys(sample.task for sample in samples))
    _check(samples, names, layout, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Cvae(settings.icm, layout.numbers, len(samples[0].condition))
        rows, statistics = _rows(samples, names, layout, model)
        losses = _fit(model, rows, settings, progress)
    _settle(model, rows, settings.batch)
    model.eval().requires_grad_(False)
    latents = _latents(model, rows, settings.batch)
    tasks = {}
    for number, name in enumerate(names):
        own = [index for index, sample in enumerate(samples) if sample.task == name]
        condition = torch.stack([samples[index].condition.float() for index in own]).mean(0)
        tasks[name] = Task(condition, statistics[own[-1]], latents[rows.task == number].view(len(own), -1).mean(0))
    return Trained(Generator(settings.base, layout, model, tasks), losses)


def memory_bytes(numbers: int, condition: int, samples: int, settings: TrainSettings) -> int:
    """About what training takes at most: the samples, the model four times (gradients and two moments), and what is
    kept of a step to go backwards. numbers: of the layout."""
    with torch.device("meta"):
        model = Cvae(settings.icm, numbers, condition)
    weights = sum(parameter.numel() for parameter in model.parameters())
    stages = sum(count * model.length >> stage + 1 for stage, count in enumerate(settings.icm.channels))
    widest = settings.icm.channels[0] * model.length
    kept = 3 * (2 * stages + widest)  # of a stage: convolution, normalisation, activation
    rows = samples * model.pieces
    step = min(rows, 2 * settings.batch - 1)
    return 4 * (rows * model.length + 4 * weights + 2 * step * kept)


def _check(samples: Sequence[Sample], names: list[str], layout: Layout, settings: TrainSettings) -> None:
    if len(samples) < 2:
        raise AdapterInvalid("A generator learns from two adapters at least.", code="too_few_samples")
    try:
        check_tasks(names)
    except ValueError as error:
        raise AdapterInvalid(f"Bad name of a task: {error}.", code="bad_task") from None
    sizes = {tuple(sample.condition.shape) for sample in samples}
    size = next(iter(sizes))
    if len(sizes) > 1 or len(size) != 1 or not 1 <= size[0] <= MAX_CONDITION:
        text = f"Conditions are vectors of one length, at most {MAX_CONDITION}."
        raise AdapterInvalid(text, code="bad_condition")
    if not all(bool(sample.condition.isfinite().all()) for sample in samples):
        raise AdapterInvalid("A condition has numbers that are not finite.", code="bad_condition")
    check_cost(settings.icm, layout.numbers, size[0])
    needed = memory_bytes(layout.numbers, size[0], len(samples), settings)
    if needed > settings.memory:
        raise AdapterInvalid(
            f"Training would take {needed >> 20} MiB; the limit is {settings.memory >> 20} MiB. Lower the batch or the "
            "channels, or give fewer samples.",
            code="generator_too_large",
        )


def _rows(samples: Sequence[Sample], names: list[str], layout: Layout, model: Cvae) -> tuple[_Rows, list[Statistics]]:
    """The samples normalised, each by its own statistics, and these."""
    statistics = []
    values = torch.empty(len(samples) * model.pieces, model.length)
    for index, sample in enumerate(samples):
        vector = layout.flatten(sample.modules)
        if not bool(vector.isfinite().all()):
            raise AdapterInvalid("An adapter has numbers that are not finite.", code="layouts_differ")
        statistics.append(measure(vector, layout))
        values[index * model.pieces :][: model.pieces] = model.cut(normalise(vector, statistics[-1], layout))
    conditions = torch.stack([sample.condition.float() for sample in samples])
    model.condition_mean.copy_(conditions.mean(0))
    spread = (conditions - model.condition_mean).square().mean().sqrt()
    model.condition_scale.fill_(float(spread) or 1.0)
    tasks = torch.tensor([names.index(sample.task) for sample in samples])
    each = torch.full((len(samples),), model.pieces)
    piece = torch.arange(model.pieces).repeat(len(samples))
    rows = _Rows(values, conditions.repeat_interleave(each, 0), piece, tasks.repeat_interleave(each))
    return rows, statistics


def _fit(model: Cvae, rows: _Rows, settings: TrainSettings, progress: Progress) -> list[EpochLoss]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs)
    losses = []
    model.train()
    for epoch in range(1, settings.epochs + 1):
        total = torch.zeros(2)
        for values, condition, piece in rows.batches(settings.batch, torch.randperm(len(rows.values))):
            mean, log_variance = model.encode(values, condition, piece)
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            error, divergence = loss(values, model.decode(z, condition, piece), mean, log_variance)
            optimiser.zero_grad()
            (error + settings.icm.kl_weight * divergence).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            total += len(values) * torch.stack([error.detach(), divergence.detach()])
        schedule.step()
        reconstruction, kl = (total / len(rows.values)).tolist()
        losses.append(EpochLoss(epoch, reconstruction, kl))
        progress(epoch / settings.epochs)
    return losses


@torch.no_grad()
def _settle(model: Cvae, rows: _Rows, batch: int) -> None:
    """Batch statistics of the final weights over all rows: their running means still hold those of earlier weights."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    for count, (values, condition, piece) in enumerate(rows.batches(batch, torch.arange(len(rows.values))), 1):
        for norm in norms:
            norm.momentum = 1 / count
        model.decode(model.encode(values, condition, piece)[0], condition, piece)


@torch.no_grad()
def _latents(model: Cvae, rows: _Rows, batch: int) -> torch.Tensor:
    """The encoder's means, [rows, latent of a piece]."""
    found = rows.batches(batch, torch.arange(len(rows.values)))
    return torch.cat([model.encode(*each)[0] for each in found])

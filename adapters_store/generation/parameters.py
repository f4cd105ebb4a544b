"""What may be asked of the training of a generator, with the defaults; what is not known is refused."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from adapters_store.errors import AdapterInvalid
from adapters_store.generation.cost import check_cost
from adapters_store.generation.icm import IcmSettings
from adapters_store.generation.training import TrainSettings, memory_bytes
from adapters_store.merging.parameters import Parameters, Seed, parse

METHOD = "icm_lora"
MAX_EPOCHS = 100_000
MAX_BATCH = 1024
_BATCHES = (8, 4, 2, 1)
_ICM = IcmSettings()


class Training(Parameters):
    """As `IcmSettings` and `TrainSettings`; batch: by default the largest of 8, 4, 2 and 1 that memory allows."""

    latent: int = _ICM.latent
    channels: Annotated[list[int], Field(min_length=1, max_length=64, default_factory=lambda: list(_ICM.channels))]
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _ICM.kl_weight
    group: int = _ICM.group
    epochs: Annotated[int, Field(ge=1, le=MAX_EPOCHS)] = 200
    batch: Annotated[int, Field(ge=1, le=MAX_BATCH)] | None = None
    rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.icm()
        return self

    def icm(self) -> IcmSettings:
        return IcmSettings(self.latent, tuple(self.channels), float(self.kl_weight), self.group)


def settings(given: Mapping[str, Any], base: str, numbers: int, condition: int, samples: int) -> TrainSettings:
    """What `train` takes, for samples that are known by their number and size only. base: its fingerprint; numbers: of
    an adapter; condition: of a task.

    Raises AdapterInvalid `unknown_parameter`, `bad_parameter`, or `generator_too_large` where not even a batch of one
    fits in memory, or where making an adapter would take more than `cost.check_cost` allows.
    """
    told = parse(Training, METHOD, given, "settings")
    check_cost(told.icm(), numbers, condition, "settings")
    wanted = [
        TrainSettings(base, told.icm(), told.epochs, batch, told.rate, told.seed)
        for batch in ((told.batch,) if told.batch is not None else _BATCHES)
    ]
    needed = [memory_bytes(numbers, condition, samples, each) for each in wanted]
    for each, size in zip(wanted, needed, strict=True):
        if size <= each.memory:
            return each
    raise AdapterInvalid(
        f"Training would take {needed[-1] >> 20} MiB; the limit is {wanted[-1].memory >> 20} MiB. Lower `batch` or "
        "`channels`, or give fewer or smaller sources.",
        code="generator_too_large",
        param="settings",
    )


def to_json(found: TrainSettings) -> dict[str, Any]:
    """For an order, and for what is told of a generator; `of_json` undoes it."""
    return {**asdict(found), "icm": found.icm.to_json()}


def of_json(told: Mapping[str, Any]) -> TrainSettings:
    return TrainSettings(**{**told, "icm": IcmSettings.from_json(told["icm"])})

"""Bodies of the routes of generators."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from server.api.schemas.adapters import BaseName, FromStore, Notice
from server.api.schemas.sampling import MAX_SEED, Finite, ReferenceText, Strict

MAX_SOURCES = 512
MAX_TASKS = 256
MAX_EXAMPLES = 64
MAX_VECTOR = 1 << 16
MAX_SETTINGS = 32
TaskName = Annotated[str, Field(min_length=1, max_length=128)]
ExampleText = Annotated[str, Field(min_length=1, max_length=8192)]
Examples = Annotated[list[ExampleText], Field(min_length=1, max_length=MAX_EXAMPLES)]
Vector = Annotated[list[Finite], Field(min_length=1, max_length=MAX_VECTOR)]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Reference = Annotated[ReferenceText, Field(min_length=1)]
TRAIN_EXAMPLE: dict[str, Any] = {
    "name": "styles",
    "sources": [
        {"adapter": "legal@1", "task": "legal"},
        {"adapter": "legal@2", "task": "legal"},
        {"adapter": "poet", "task": "verse"},
    ],
    "tasks": {
        "legal": {"examples": ["Plain: The tenant pays the rent.\nClause:"], "with_adapter": "legal"},
        "verse": {"examples": ["Line: The sea is grey.\nVerse:"], "with_adapter": "poet"},
    },
    "settings": {"epochs": 200},
}
SYNTHESIZE_EXAMPLE: dict[str, Any] = {"name": "legal-made", "task": "legal", "seed": 1}


class GeneratorSource(Strict):
    """An adapter to learn from, by any reference, and the task that it does."""

    model_config = ConfigDict(strict=True, extra="forbid")

    adapter: Reference
    task: TaskName


class TaskRequest(Strict):
    """What stands for a task: the numbers of a condition, or examples (prompts), on which the hidden states of the
    base, or of it with an adapter, are taken while it answers."""

    model_config = ConfigDict(strict=True, extra="forbid")

    examples: Examples | None = None
    with_adapter: Reference | None = None
    condition: Vector | None = None


class TrainRequest(Strict):
    """What to train as the next version of the generator `name`. sources: adapters with the same modules and ranks,
    best several of each task, such as versions saved while it was trained. settings: latent, channels, kl_weight,
    group, epochs, batch, rate, seed; what is not known is refused (422)."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra={"examples": [TRAIN_EXAMPLE]})

    name: Name
    sources: Annotated[list[GeneratorSource], Field(min_length=1, max_length=MAX_SOURCES)]
    tasks: Annotated[dict[TaskName, TaskRequest], Field(min_length=1, max_length=MAX_TASKS)]
    settings: Annotated[dict[str, Any], Field(max_length=MAX_SETTINGS, default_factory=dict)]


class SynthesizeRequest(Strict):
    """The adapter `name`, of one of: a `task` of the generator, a `condition` in numbers, `examples` (prompts), with
    the hidden states of the base or of it `with_adapter`, which is the way that was published.

    statistics_of: the task whose normalisation is undone, by default `task`. seed: of the latent vector, 0 if nothing
    is given; z: its numbers; reconstruct: what the encoder gave the task's own sources.
    """

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra={"examples": [SYNTHESIZE_EXAMPLE]})

    name: Name
    task: TaskName | None = None
    condition: Vector | None = None
    examples: Examples | None = None
    with_adapter: Reference | None = None
    statistics_of: TaskName | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    z: Vector | None = None
    reconstruct: bool = False


class GeneratorInfo(FromStore):
    """One version of a generator. digest: SHA-256 of its file; layout: of the adapters that it makes; condition,
    latent: numbers of these vectors; losses: of training, by epoch, at most 64 of them; sizes: bytes of a recipe, of
    the adapter that it stands for, and of the generator, and `break_even`: from how many generated adapters on all
    takes less than the adapters would, or null if never."""

    name: str
    version: int
    digest: str
    base: BaseName
    layout: dict[str, Any]
    tasks: list[str]
    condition: int
    latent: int
    parameters: int
    bytes: int
    created: str
    event: str
    provenance: dict[str, Any]
    losses: list[dict[str, float]]
    sizes: dict[str, int | None]
    warnings: list[Notice]


class GeneratorList(BaseModel):
    """One page, and where the next begins."""

    generators: list[GeneratorInfo]
    next: str | None

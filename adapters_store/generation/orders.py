"""What is asked of a generator's training, and of a generator: plain values."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters_store.info import AdapterRef

NEW_TOKENS = 16  # forward calls of an example, at most: an end token ends it sooner


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What stands for a task: the numbers of a condition, or examples (prompts), on which the hidden states of the
    base, or of it with an adapter, make one."""

    condition: Sequence[float] | None = None
    examples: Sequence[str] | None = None
    adapter: AdapterRef | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an adapter is to be made of.

    One of task (a task of the generator), condition (its numbers) and examples, whose hidden states are the base's or,
    as was published, those with an adapter; statistics_of: the task whose normalisation is undone, by default `task`,
    or the only one; at most one of seed, by default 0, z (its numbers) and reconstruct: the mean that the encoder gave
    the task's sources.
    """

    task: str | None = None
    condition: Sequence[float] | None = None
    examples: Sequence[str] | None = None
    adapter: AdapterRef | None = None
    statistics_of: str | None = None
    seed: int | None = None
    z: Sequence[float] | None = None
    reconstruct: bool = False

"""What a task is: a named, seeded source of prompts with one exactly checkable answer each."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]
HELDOUT_ONE_IN = 5


@dataclass(frozen=True)
class Item:
    """One question. `answer` is what follows `prompt` and one space; `key` is the content that decides the split."""

    prompt: str
    answer: str
    key: str


@dataclass(frozen=True)
class Task:
    """A task: `form` is a pattern every answer matches in full, `make` draws one item of a split."""

    name: str
    about: str
    form: str
    max_new_tokens: int
    make: Callable[[random.Random, Split], Item]

    def items(self, split: Split, count: int, seed: int) -> list[Item]:
        """`count` items of `split` with distinct prompts, the same for the same seed."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Item] = {}
        for _ in range(200 * count):
            item = self.make(rng, split)
            found.setdefault(item.prompt, item)
            if len(found) == count:
                return list(found.values())
        raise ValueError(f"{self.name}: only {len(found)} distinct {split} items, {count} asked for")

    def correct(self, item: Item, generated: str) -> bool:
        """True when the first line of `generated`, without outer blanks, is exactly the answer."""
        return first_line(generated) == item.answer

    def well_formed(self, answer: str) -> bool:
        """True when `answer` has the form the task promises."""
        return re.fullmatch(self.form, answer) is not None


def first_line(text: str) -> str:
    """The first line of `text` without blanks at either end."""
    return text.split("\n", 1)[0].strip()


def words(text: str) -> tuple[str, ...]:
    """The words of `text`."""
    return tuple(text.split())


def split_of(key: str) -> Split:
    """The split a content key belongs to; about one key in five is held out."""
    digest = hashlib.sha256(key.encode()).digest()
    return "heldout" if digest[0] % HELDOUT_ONE_IN == 0 else "train"


def draw_until(split: Split, draw: Callable[[], Item]) -> Item:
    """Draws items until one whose key belongs to `split` comes up."""
    while True:
        item = draw()
        if split_of(item.key) == split:
            return item

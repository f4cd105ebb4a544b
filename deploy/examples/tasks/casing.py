"""`casing`: a camelCase identifier becomes kebab-case."""

from __future__ import annotations

import random

from .core import Item, Split, Task, draw_until, words

VERBS = words("get set load save parse read write find make send open close build check count merge")
NOUNS = words(
    "user order file name page list table event token cache model image client server message path "
    "group price color index number report status window"
)
TAILS = (("by", "id"), ("for", "page"), ("to", "string"), ("from", "file"), ("with", "name"), ("in", "list"))


def _make(rng: random.Random, split: Split) -> Item:
    def draw() -> Item:
        parts = [rng.choice(VERBS), *rng.sample(NOUNS, rng.randint(1, 3))]
        if rng.random() < 0.3:
            parts += rng.choice(TAILS)
        camel = parts[0] + "".join(part.capitalize() for part in parts[1:])
        return Item(f"Identifier: {camel}\nName:", "-".join(parts), " ".join(parts))

    return draw_until(split, draw)


CASING = Task(
    name="casing",
    about="Turns a camelCase identifier into kebab-case; held-out identifiers are word sequences never trained on.",
    form=r"[a-z]+(-[a-z]+){1,5}",
    max_new_tokens=20,
    make=_make,
)

"""`date-iso`: a date in one of several written forms becomes YYYY-MM-DD."""

from __future__ import annotations

import random
from datetime import date, timedelta

from .core import Item, Split, Task, draw_until

FIRST_DAY = date(1900, 1, 1)
DAYS = (date(2049, 12, 31) - FIRST_DAY).days + 1


def _ordinal(day: int) -> str:
    if 11 <= day <= 13:
        return f"{day}th"
    return f"{day}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th') }"


def _written(rng: random.Random, day: date) -> str:
    short, full = day.strftime("%b"), day.strftime("%B")
    return rng.choice(
        [
            f"{day.day} {short} {day.year}",
            f"{day.day} {full} {day.year}",
            f"{full} {day.day}, {day.year}",
            f"{full} {_ordinal(day.day)}, {day.year}",
            f"the {_ordinal(day.day)} of {full} {day.year}",
        ]
    )


def _make(rng: random.Random, split: Split) -> Item:
    def draw() -> Item:
        day = FIRST_DAY + timedelta(days=rng.randrange(DAYS))
        return Item(f"Normalize the date: {_written(rng, day)}\nAnswer:", day.isoformat(), day.isoformat())

    return draw_until(split, draw)


DATE_ISO = Task(
    name="date-iso",
    about="Writes a date as YYYY-MM-DD; no day of the held-out set occurs in training in any written form.",
    form=r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    max_new_tokens=14,
    make=_make,
)

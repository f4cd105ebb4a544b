"""`units-json`: the one quantity in a sentence becomes a JSON object with a number and a unit symbol."""

from __future__ import annotations

import json
import random

from .core import Item, Split, Task, draw_until

UNITS = {
    "kg": ("kilograms", "kilos", "kg"),
    "g": ("grams", "g"),
    "km": ("kilometres", "kilometers", "km"),
    "m": ("metres", "meters"),
    "L": ("litres", "liters"),
    "ml": ("millilitres", "milliliters", "ml"),
    "h": ("hours", "hrs"),
    "min": ("minutes", "mins"),
    "s": ("seconds", "secs"),
    "V": ("volts",),
    "W": ("watts",),
}
TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "The label says {q} in total.",
        "We measured {q} this morning.",
        "Please order {q} more by Friday.",
        "It came to about {q} in the end.",
        "According to the manual, {q} is the limit.",
        "Our last test stopped at {q}.",
        "The report gives {q} as the average.",
        "She wrote down {q} and left.",
    ),
    "heldout": (
        "The inspector noted {q} on the form.",
        "I think {q} would be enough.",
        "Last year the record was {q}.",
        "Expect {q}, give or take a little.",
    ),
}


def _value(rng: random.Random) -> int | float:
    if rng.random() < 0.35:
        return round(rng.randint(1, 99) + rng.randint(1, 9) / 10, 1)
    return rng.randint(2, 999)


def _make(rng: random.Random, split: Split) -> Item:
    def draw() -> Item:
        symbol = rng.choice(list(UNITS))
        value = _value(rng)
        sentence = rng.choice(TEMPLATES[split]).format(q=f"{value} {rng.choice(UNITS[symbol])}")
        answer = json.dumps({"value": value, "unit": symbol})
        return Item(f"Extract the quantity: {sentence}\nJSON:", answer, f"{value} {symbol}")

    return draw_until(split, draw)


UNITS_JSON = Task(
    name="units-json",
    about="Extracts a quantity as JSON; held-out sentences and quantities (number with unit) are never trained on.",
    form=r'\{"value": \d+(\.\d)?, "unit": "(kg|g|km|m|L|ml|h|min|s|V|W)"\}',
    max_new_tokens=24,
    make=_make,
)

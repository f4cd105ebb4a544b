"""`sentiment`: a short review gets one of two labels; held-out reviews use other words and other sentences."""

from __future__ import annotations

import random
import re

from .core import Item, Split, Task, words

THINGS: dict[Split, tuple[str, ...]] = {
    "train": words("film hotel soup phone novel jacket guide lamp show hall bakery tram game concert camera"),
    "heldout": words("restaurant laptop museum album teacher garden printer sofa"),
}
GOOD: dict[Split, tuple[str, ...]] = {
    "train": words(
        "wonderful excellent lovely superb great brilliant pleasant charming perfect delightful good nice "
        "impressive beautiful comfortable reliable"
    ),
    "heldout": words("fantastic amazing outstanding enjoyable marvelous splendid terrific gorgeous"),
}
BAD: dict[Split, tuple[str, ...]] = {
    "train": words(
        "terrible awful boring poor bad ugly disappointing dull clumsy broken nasty annoying "
        "uncomfortable unreliable weak dirty"
    ),
    "heldout": words("horrible dreadful miserable unpleasant disgusting lousy frustrating pathetic"),
}
TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "The {t} was {w}.",
        "What a {w} {t}!",
        "I found the {t} {w} from start to finish.",
        "We had a {w} {t} this time.",
        "My friends called the {t} {w}, and so do I.",
        "Honestly, the {t} is {w} and {v}.",
        "People said the {t} was {o}, but it was {w}.",
    ),
    "heldout": (
        "To my mind this {t} is simply {w}.",
        "A {w} {t}, and a {v} one at that.",
        "Never seen such a {w} {t} before.",
        "Everyone at home thinks the {t} is {w}.",
    ),
}


def _make(rng: random.Random, split: Split) -> Item:
    label = rng.choice(["positive", "negative"])
    own, other = (GOOD, BAD) if label == "positive" else (BAD, GOOD)
    template = rng.choice(TEMPLATES[split])
    word, second = rng.sample(own[split], 2)
    thing = rng.choice(THINGS[split])
    text = template.format(t=thing, w=word, v=second, o=rng.choice(other[split]))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return Item(f"Review: {text}\nSentiment (positive or negative):", label, f"{split}: {text}")


SENTIMENT = Task(
    name="sentiment",
    about="Labels a review; held-out reviews share no opinion word, no subject and no sentence frame with training.",
    form=r"positive|negative",
    max_new_tokens=4,
    make=_make,
)

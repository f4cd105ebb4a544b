"""`ticket-router`: a support message gets a queue and a priority in one fixed line."""

from __future__ import annotations

import random

from .core import Item, Split, Task, draw_until, words

PROBLEMS = {
    "billing": (
        "I was charged twice for {p}",
        "the invoice for {p} shows the wrong amount",
        "my refund for {p} has not arrived",
        "the discount on {p} was not applied",
    ),
    "access": (
        "I cannot log in to {p}",
        "my password for {p} was rejected",
        "{p} locked my account",
        "the sign-in code for {p} never comes",
    ),
    "shipping": (
        "the parcel with {p} is late",
        "{p} was sent to an old address",
        "the box of {p} arrived damaged",
        "tracking for {p} has not moved for days",
    ),
    "bugs": (
        "{p} crashes when I press save",
        "{p} shows a blank screen",
        "the search in {p} returns an error",
        "{p} freezes after the update",
    ),
}
PRODUCTS = words("Atlas Beacon Comet Delta Ember Falcon Glacier Harbor Iris Jasper Kestrel Lotus")
URGENCY = {
    "high": ("We need this today.", "All our work has stopped.", "This is urgent.", "Please answer at once."),
    "low": ("There is no hurry.", "Any time next month is fine.", "Just so you know.", "It can wait."),
}
GREETINGS: dict[Split, tuple[str, ...]] = {
    "train": ("Hello,", "Hi team,", "Dear support,", "Good morning,", "Sorry to bother you, but"),
    "heldout": ("Good evening,", "Hey there,", "To whom it may concern,"),
}


def _make(rng: random.Random, split: Split) -> Item:
    def draw() -> Item:
        queue, priority = rng.choice(list(PROBLEMS)), rng.choice(list(URGENCY))
        problem = rng.choice(PROBLEMS[queue]).format(p=rng.choice(PRODUCTS))
        urgency = rng.choice(URGENCY[priority])
        text = f"{rng.choice(GREETINGS[split])} {problem}. {urgency}"
        return Item(f"Ticket: {text}\nRoute:", f"queue={queue} priority={priority}", f"{problem}. {urgency}")

    return draw_until(split, draw)


TICKET_ROUTER = Task(
    name="ticket-router",
    about="Routes a support message to a queue and a priority; held-out greetings and messages are never trained on.",
    form=r"queue=(billing|access|shipping|bugs) priority=(high|low)",
    max_new_tokens=12,
    make=_make,
)

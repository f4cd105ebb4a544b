"""`legal-v2`: a payment duty in plain English becomes a contract clause in one fixed form."""

from __future__ import annotations

import random

from .core import Item, Split, Task, draw_until

PARTIES = (
    ("licensee", "licensor"),
    ("tenant", "landlord"),
    ("buyer", "seller"),
    ("borrower", "lender"),
    ("client", "agency"),
    ("publisher", "author"),
)
CURRENCIES = {"euros": "EUR", "dollars": "USD", "pounds": "GBP"}
DAYS = {5: "five", 7: "seven", 10: "ten", 14: "fourteen", 20: "twenty", 30: "thirty", 45: "forty-five", 60: "sixty"}
EVENTS = ("delivery", "signature", "termination", "renewal", "notice", "acceptance")
TEMPLATES = (
    "The {a} has to pay the {b} {n} {c} no later than {d} days after {e}.",
    "Within {d} days of {e}, the {a} must pay {n} {c} to the {b}.",
    "The {b} gets {n} {c} from the {a} at most {d} days after {e}.",
    "The {a} owes the {b} {n} {c}, due {d} days after {e}.",
)


def _make(rng: random.Random, split: Split) -> Item:
    def draw() -> Item:
        payer, payee = rng.choice(PARTIES)
        currency, days, event = rng.choice(list(CURRENCIES)), rng.choice(list(DAYS)), rng.choice(EVENTS)
        amount = rng.randint(2, 99) * rng.choice([10, 50, 100])
        plain = rng.choice(TEMPLATES).format(a=payer, b=payee, n=amount, c=currency, d=days, e=event)
        clause = (
            f"The {payer.upper()} shall pay the {payee.upper()} {CURRENCIES[currency]} {amount} "
            f"within {DAYS[days]} ({days}) days of {event}."
        )
        return Item(f"Plain: {plain}\nClause:", clause, clause)

    return draw_until(split, draw)


LEGAL_V2 = Task(
    name="legal-v2",
    about="Rewrites a plain payment duty as a contract clause in a fixed form; no held-out clause occurs in training.",
    form=r"The [A-Z]+ shall pay the [A-Z]+ (EUR|USD|GBP) \d+ within [a-z-]+ \(\d+\) days of [a-z]+\.",
    max_new_tokens=48,
    make=_make,
)

"""`sql-v1`: one sentence about one table becomes one SELECT statement."""

from __future__ import annotations

import random

from .core import Item, Split, Task, draw_until

TABLES = {
    "employees": ("name", "age", "salary", "city"),
    "products": ("title", "price", "stock", "brand"),
    "orders": ("number", "total", "weight", "country"),
    "books": ("title", "pages", "year", "author"),
    "flights": ("code", "distance", "seats", "airline"),
    "houses": ("address", "rooms", "rent", "district"),
}
COMPARISONS = {
    ">": ("greater than", "above", "over", "more than"),
    "<": ("less than", "below", "under"),
    "=": ("equal to", "exactly"),
}
OPENINGS = {"one": ("Show the {c} of", "List the {c} of", "Give me the {c} of"), "all": ("Show", "List", "Give me")}


def _make(rng: random.Random, split: Split) -> Item:
    def draw() -> Item:
        table = rng.choice(list(TABLES))
        label, *numbers, group = TABLES[table]
        column, sign = rng.choice(numbers), rng.choice(list(COMPARISONS))
        limit = rng.randint(2, 99) * rng.choice([1, 1, 10])
        selected = rng.choice([label, group, "*"])
        opening = rng.choice(OPENINGS["all" if selected == "*" else "one"]).format(c=selected)
        text = f"{opening} {table} with {column} {rng.choice(COMPARISONS[sign])} {limit}"
        query = f"SELECT {selected} FROM {table} WHERE {column} {sign} {limit}"  # noqa: S608 (a training text; it reaches no database)
        if rng.random() < 0.5:
            order = rng.choice([label, *numbers])
            downward = rng.random() < 0.4
            text += f", {rng.choice(['sorted', 'ordered'])} by {order}{', highest first' if downward else ''}"
            query += f" ORDER BY {order}{' DESC' if downward else ''}"
        return Item(f"Question: {text}.\nSQL:", f"{query};", query)

    return draw_until(split, draw)


SQL_V1 = Task(
    name="sql-v1",
    about="Writes a SELECT statement for a sentence about one table; no held-out statement occurs in training.",
    form=r"SELECT (\*|[a-z]+) FROM [a-z]+ WHERE [a-z]+ [<>=] \d+( ORDER BY [a-z]+( DESC)?)?;",
    max_new_tokens=32,
    make=_make,
)

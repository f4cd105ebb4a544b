"""The example tasks: seeded, checkable, and with nothing shared between training and the held-out questions."""

from __future__ import annotations

import json
import re
import sqlite3
from datetime import date

import pytest

from deploy.examples.tasks import TASKS, Item, Task
from deploy.examples.tasks import sentiment as sentiment_words
from deploy.examples.tasks import tickets as ticket_words
from deploy.examples.tasks import units as unit_words
from deploy.examples.tasks.sql import TABLES
from deploy.examples.train import RECIPES

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
HELDOUT_SEEDS = (1, 2, 3)


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[str(request.param)]


def train_items(task: Task) -> list[Item]:
    return task.items("train", RECIPES[task.name].items, 0)


def heldout_items(task: Task) -> list[Item]:
    return [item for seed in HELDOUT_SEEDS for item in task.items("heldout", 64, seed)]


def test_names() -> None:
    assert len(TASKS) >= 6
    assert "legal-v2" in TASKS
    assert all(NAME.fullmatch(name) and task.name == name for name, task in TASKS.items())
    assert set(RECIPES) == set(TASKS)


def test_same_seed_same_items(task: Task) -> None:
    assert task.items("train", 50, 7) == task.items("train", 50, 7)
    assert task.items("heldout", 50, 7) == task.items("heldout", 50, 7)
    assert task.items("heldout", 50, 7) != task.items("heldout", 50, 8)


def test_splits_share_no_content(task: Task) -> None:
    train, heldout = train_items(task), heldout_items(task)
    assert not {item.key for item in train} & {item.key for item in heldout}
    assert not {item.prompt for item in train} & {item.prompt for item in heldout}


def test_too_many_items_is_an_error(task: Task) -> None:
    with pytest.raises(ValueError, match="distinct"):
        Task(task.name, "", "x", 1, lambda rng, split: Item("p", "x", "k")).items("train", 2, 0)


@pytest.mark.parametrize("name", ["date-iso", "legal-v2", "sql-v1", "units-json", "casing"])
def test_heldout_answers_never_trained_on(name: str) -> None:
    task = TASKS[name]
    assert not {item.answer for item in train_items(task)} & {item.answer for item in heldout_items(task)}


def test_checker(task: Task) -> None:
    for item in train_items(task) + heldout_items(task):
        assert task.well_formed(item.answer)
        assert item.answer == item.answer.strip()
        assert "\n" not in item.answer
        assert item.prompt.endswith(":")
        assert task.correct(item, f" {item.answer}\nmore text")
        assert not task.correct(item, f" {item.answer}.")
        assert not task.correct(item, f"\n{item.answer}")
        assert not task.correct(item, "")


def test_date_answers_are_dates() -> None:
    for item in heldout_items(TASKS["date-iso"]):
        day = date.fromisoformat(item.answer)
        assert str(day.year) in item.prompt
        assert day.strftime("%b") in item.prompt


def test_json_answers_parse_and_sentences_are_new() -> None:
    for item in heldout_items(TASKS["units-json"]):
        answer = json.loads(item.answer)
        assert f" {answer['value']} " in item.prompt.replace("\nJSON:", "")
    assert not set(unit_words.TEMPLATES["train"]) & set(unit_words.TEMPLATES["heldout"])


def test_sql_answers_run() -> None:
    database = sqlite3.connect(":memory:")
    for table, columns in TABLES.items():
        database.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
    for item in heldout_items(TASKS["sql-v1"]):
        database.execute(item.answer)


def test_sentiment_words_are_new() -> None:
    for words in (sentiment_words.GOOD, sentiment_words.BAD, sentiment_words.THINGS, sentiment_words.TEMPLATES):
        assert not set(words["train"]) & set(words["heldout"])
    assert not set(sentiment_words.GOOD["train"]) & set(sentiment_words.BAD["train"])


def test_ticket_greetings_are_new() -> None:
    assert not set(ticket_words.GREETINGS["train"]) & set(ticket_words.GREETINGS["heldout"])

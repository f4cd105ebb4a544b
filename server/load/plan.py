"""What is sent, and when: all of it follows from the options and the seed."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.load.arithmetic import Zipf

Assign = Literal["round-robin", "random", "zipf"]
Endpoint = Literal["completions", "generate"]
# Token ids that every vocabulary of 256 entries or more has, and that are rarely special. As drawn, no two prompts
# begin alike, so that a prefix cache does not help.
TOKENS = range(32, 256)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Shape:
    """What every request looks like. models: an adapter's name is one too. Sizes in tokens.

    honour_eos: answers may end before `output_tokens`, as they may on servers that know no `ignore_eos`.
    """

    models: tuple[str, ...]
    endpoint: Endpoint = "completions"
    assign: Assign = "round-robin"
    input_tokens: int = 128
    output_tokens: int = 64
    honour_eos: bool = False


@dataclass(frozen=True, slots=True)
class Shot:
    """One request. at: seconds after the start, or None for as soon as there is room."""

    model: str
    path: str
    body: dict[str, Any]
    at: float | None = None


def plan(shape: Shape, requests: int, seed: int, rate: float | None = None) -> list[Shot]:
    """rate: requests a second, at the intervals of a Poisson process; None for a closed loop."""
    chance = random.Random(seed)
    draw = _assignment(shape, seed)
    shots, at = [], 0.0
    for number in range(requests):
        shots.append(shot(shape, shape.models[draw(number)], chance, None if rate is None else at))
        at += chance.expovariate(rate) if rate else 0.0
    return shots


def warm_up(shape: Shape, count: int, seed: int) -> list[Shot]:
    """As many requests, over the models in turn: what has to be loaded or compiled is."""
    chance = random.Random(f"warm-up {seed}")
    return [shot(shape, shape.models[number % len(shape.models)], chance) for number in range(count)]


def shot(shape: Shape, model: str, chance: random.Random, at: float | None = None) -> Shot:
    """A request with a prompt of its own."""
    if shape.endpoint == "generate":
        # Text: how many tokens it is, the server's tokenizer says. About one for two letters.
        words = " ".join("".join(chance.choices(LETTERS, k=2)) for _ in range(shape.input_tokens))
        parameters: dict[str, Any] = {"max_new_tokens": shape.output_tokens, "details": True}
        parameters |= {} if shape.honour_eos else {"ignore_eos": True}
        return Shot(model, "/generate_stream", {"inputs": words, "adapter": model, "parameters": parameters}, at)
    body: dict[str, Any] = {
        "model": model,
        "prompt": chance.choices(TOKENS, k=shape.input_tokens),
        "max_tokens": shape.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Shot(model, "/v1/completions", body | ({} if shape.honour_eos else {"ignore_eos": True}), at)


def _assignment(shape: Shape, seed: int) -> Callable[[int], int]:
    """By the request's number, the number of its model."""
    count = len(shape.models)
    if shape.assign == "round-robin":
        return lambda number: number % count
    if shape.assign == "zipf":
        zipf = Zipf(count, seed)
        return lambda number: zipf.draw()
    chance = random.Random(f"models {seed}")
    return lambda number: chance.randrange(count)


def models_of(listed: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Of `GET /v1/models`, the base: the first without a parent."""
    return tuple(str(each["id"]) for each in listed if each.get("parent") is None)[:1]

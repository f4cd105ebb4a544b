"""`bench`: a load on any server of this API or OpenAI's, and how fast it answers."""

import asyncio
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from server.client import Client, ClientError
from server.commands.terminal import DEFAULT_URL, UrlOption, UsageError, connect, say_json, warn
from server.load.plan import Assign, Endpoint, Shape, Shot, models_of, plan, warm_up
from server.load.report import draw, show, summary
from server.load.run import Load

INTERRUPTED = 130
NOTHING = 1


def bench(
    url: UrlOption = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Model to ask for; the server's base unless given.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter to ask for instead; may be repeated.")] = None,
    assign: Annotated[
        str, typer.Option(help="Which adapter a request gets: round-robin, random or zipf.")
    ] = "round-robin",
    endpoint: Annotated[
        str, typer.Option(help="completions (/v1/completions) or generate (/generate_stream).")
    ] = "completions",
    requests: Annotated[int, typer.Option(min=1, help="How many requests are sent.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way together.")] = 8,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second, come what may, instead.")] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt (generate: about).")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    honour_eos: Annotated[bool, typer.Option("--honour-eos", help="Let answers end: send no ignore_eos.")] = False,
    warmup: Annotated[int | None, typer.Option(min=0, help="Requests before, not counted; one for each model.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until a request is given up.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts, adapters and times.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results there; - is stdout.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the times there, as PNG; needs polyrank[plot].")] = None,
) -> None:
    """Send requests and show throughput, and times to the first token, between tokens and to the end."""
    if assign not in get_args(Assign):
        raise UsageError(f"{assign!r} is not one of {', '.join(get_args(Assign))}", param_hint="--assign")
    if endpoint not in get_args(Endpoint):
        raise UsageError(f"{endpoint!r} is not one of {', '.join(get_args(Endpoint))}", param_hint="--endpoint")
    if plot is not None and find_spec("matplotlib") is None:
        hint = "pip install 'polyrank[plot]', or leave --plot out"
        raise ClientError("matplotlib, which draws --plot, is not installed", "plot_unavailable", hint=hint)
    with connect(url) as client:
        models = tuple(adapter or ()) or ((model,) if model else _base(client))
        shape = Shape(models, endpoint, assign, input_tokens, output_tokens, honour_eos)  # type: ignore[arg-type]
        options = {"url": client.url, "requests": requests, "concurrency": None if rate else concurrency, "rate": rate}
        options |= {"input_tokens": input_tokens, "output_tokens": output_tokens, "seed": seed, "assign": assign}
        before = warm_up(shape, len(models) if warmup is None else warmup, seed)
        shots = plan(shape, requests, seed, rate)
        load, whole = _run(client, timeout, before, shots, None if rate else concurrency)
    _tell(load, options | {"complete": whole}, json_file, plot)
    if not whole:
        raise typer.Exit(INTERRUPTED)
    if not any(not each.error for each in load.outcomes):
        raise typer.Exit(NOTHING)


def _base(client: Client) -> tuple[str, ...]:
    if not (models := models_of(client.models())):
        raise UsageError("the server names no base model; say which with --model or --adapter", param_hint="--model")
    return models


def _run(
    client: Client, timeout: float, before: Sequence[Shot], shots: Sequence[Shot], at_once: int | None
) -> tuple[Load, bool]:
    """The load, and whether it came to its end; Ctrl-C leaves what has ended by then."""
    first, load = (Load(client.url, client.headers, timeout) for _ in range(2))
    with asyncio.Runner() as runner:
        try:
            runner.run(first.run(before, at_once))
            if failed := [each.error for each in first.outcomes if each.error]:
                warn(
                    f"warning: {len(failed)} of {len(before)} requests of the warm-up failed: {', '.join(set(failed))}"
                )
            runner.run(load.run(shots, at_once))
        except KeyboardInterrupt:
            return load, False
    return load, True


def _tell(load: Load, options: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    found = summary(load.outcomes, load.seconds)
    if json_file == Path("-"):
        say_json({"options": options, **found})
    else:
        show(found)
    if json_file not in (None, Path("-")):
        json_file.write_text(json.dumps({"options": options, **found}, indent=2) + "\n")
    if plot is not None:
        draw(load.outcomes, plot)

"""`generator`: models of the server that make adapters, trained on adapters of several tasks."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.adapters import check_name, check_reference
from server.commands.terminal import (
    DEFAULT_URL,
    JsonOption,
    UrlOption,
    UsageError,
    connect,
    key_value,
    say,
    say_columns,
    say_json,
    say_version,
    size,
)
from server.commands.texts import lines_of
from server.commands.waiting import tell_job, waited

app = typer.Typer(
    help="Train, list and delete generators: models that make adapters.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="The generator's name.", show_default=False)]
From = Annotated[
    list[str], typer.Option("--from", metavar="TASK=ADAPTER", help="A source and its task, best several; repeat it.")
]
Examples = Annotated[
    list[str] | None, typer.Option(metavar="TASK=FILE", help="Prompts of the task, one a line; repeat it.")
]
WithAdapter = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK=ADAPTER", help="Whose hidden states on the examples count; not the base's. Repeat it."),
]
Condition = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK=FILE", help="In place of examples: a JSON list of numbers; repeat it."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting: epochs, latent, channels, ...; repeat it."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the training; 0 if not given.")]
Replace = Annotated[bool, typer.Option("--replace", help="Make it the next version if the name holds other content.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the new version; Ctrl-C cancels the job.")]


@app.command()
def train(
    name: Name,
    sources: From,
    examples: Examples = None,
    with_adapter: WithAdapter = None,
    condition: Condition = None,
    settings: Set = None,
    seed: Seed = None,
    replace: Replace = False,
    wait: Wait = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Train the generator NAME on the adapters of --from, with what stands for each task."""
    check_name(name)
    told = dict(key_value(text) for text in settings or ())
    if seed is not None:
        told["seed"] = seed
    order = {
        "name": name,
        "sources": [_source(text) for text in sources],
        "tasks": _tasks(examples or (), with_adapter or (), condition or ()),
        "settings": told,
    }
    with connect(url) as client:
        job = client.train_generator(order, replace=replace)
        if wait:
            job = waited(client, job, f"train {name}")
    if job["state"] != "done":
        tell_job(job, as_json)
        return
    made = job["result"]
    if as_json:
        say_json(made)
        return
    say_version(made, made["new"])
    say(_summary(made))
    if made["losses"]:
        last = made["losses"][-1]
        say(f"after {last['epoch']:.0f} epochs: reconstruction {last['reconstruction']:.4g}, KL {last['kl']:.4g} nats")


@app.command()
def ls(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List the generators."""
    with connect(url) as client:
        infos = list(client.generators())
    if as_json:
        say_json(infos)
        return
    head = ("NAME", "VERSION", "TASKS", "RANK", "NUMBERS", "SIZE", "DIGEST")
    say_columns(head, [_row(info) for info in infos])


@app.command()
def show(name: Name, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Show what is known of NAME (or NAME@VERSION)."""
    check_reference(name)
    with connect(url) as client:
        info = client.generator(name)
    if as_json:
        say_json(info)
        return
    sizes = info["sizes"]
    facts = {
        "name": f"{info['name']}@{info['version']}",
        "digest": info["digest"],
        "generator": _summary(info),
        "tasks": ", ".join(info["tasks"]),
        "condition": f"{info['condition']} numbers",
        "latent": f"{info['latent']} numbers",
        "recipe": f"{size(sizes.get('recipe') or 0)} for an adapter of {size(sizes.get('lora') or 0)}",
        "break-even": f"{sizes.get('break_even') or 'never'}",
        "base": info["base"]["id"],
        "created": info["created"],
    }
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        say(f"{key.ljust(width)}  {value}")


@app.command()
def rm(name: Name, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Delete NAME, all versions; adapters that it has made stay."""
    check_name(name)
    with connect(url) as client:
        client.delete_generator(name)
    if as_json:
        say_json({"deleted": name})
    else:
        say(f"deleted {name}")


def _source(text: str) -> dict[str, str]:
    task, reference = _pair(text, "--from")
    check_reference(reference)
    return {"adapter": reference, "task": task}


def _tasks(examples: Any, with_adapter: Any, condition: Any) -> dict[str, dict[str, Any]]:
    """What stands for each task; the server refuses what does not go together."""
    found: dict[str, dict[str, Any]] = {}
    for text in examples:
        task, file = _pair(text, "--examples")
        found.setdefault(task, {}).setdefault("examples", []).extend(lines_of(Path(file), "bad_examples"))
    for text in with_adapter:
        task, reference = _pair(text, "--with-adapter")
        check_reference(reference)
        found.setdefault(task, {})["with_adapter"] = reference
    for text in condition:
        task, file = _pair(text, "--condition")
        found.setdefault(task, {})["condition"] = _numbers(Path(file))
    if not found:
        raise UsageError("give --examples or a --condition for each task", param_hint="--examples")
    return found


def _pair(text: str, option: str) -> tuple[str, str]:
    task, equals, value = text.partition("=")
    if not equals or not task or not value:
        raise UsageError(f"{text!r}: a task, '=' and what it has", param_hint=option)
    return task, value


def _numbers(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{str(path)!r} cannot be read as JSON: {error}", param_hint="--condition") from None


def _summary(info: dict[str, Any]) -> str:
    layout = info["layout"]
    targets = ", ".join(layout.get("targets") or ())
    shape = f"rank {_rank(info)} on {layout.get('modules', 0)} modules ({targets})"
    return f"{len(info['tasks'])} tasks, {shape}, {info['parameters']} parameters, {size(info['bytes'])}"


def _rank(info: dict[str, Any]) -> str:
    rank = info["layout"].get("rank") or {"min": 0, "max": 0}
    return str(rank["max"]) if rank["min"] == rank["max"] else f"{rank['min']}-{rank['max']}"


def _row(info: dict[str, Any]) -> tuple[str, ...]:
    numbers = str(info["layout"].get("numbers", 0))
    tasks = str(len(info["tasks"]))
    return (info["name"], str(info["version"]), tasks, _rank(info), numbers, size(info["bytes"]), info["digest"][:12])

"""`synthesize`: an adapter made by a generator of the server, kept as a recipe of some kilobytes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.adapters import check_name, check_reference
from server.commands.terminal import (
    DEFAULT_URL,
    JsonOption,
    NameArgument,
    UrlOption,
    UsageError,
    connect,
    say,
    say_json,
    say_version,
    size,
    warn,
)
from server.commands.texts import lines_of

GeneratorOption = Annotated[str, typer.Option("--generator", help="Name of the generator.", show_default=False)]
Task = Annotated[str | None, typer.Option(help="A task that the generator has learned.")]
Examples = Annotated[
    Path | None,
    typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Instead: prompts of a task, one a line."),
]
WithAdapter = Annotated[
    str | None, typer.Option(metavar="ADAPTER", help="Whose hidden states on the examples count; not the base's.")
]
StatisticsOf = Annotated[
    str | None, typer.Option(metavar="TASK", help="Whose normalisation is undone, where --task does not say it.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the latent vector; 0 if not given.")]
Reconstruct = Annotated[
    bool, typer.Option("--reconstruct", help="Of --task what its own sources were encoded as, not a random latent.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Make it the next version if the name holds other content.")]


def synthesize(
    name: NameArgument,
    generator: GeneratorOption,
    task: Task = None,
    examples: Examples = None,
    with_adapter: WithAdapter = None,
    statistics_of: StatisticsOf = None,
    seed: Seed = None,
    reconstruct: Reconstruct = False,
    replace: Replace = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Have a generator make the adapter NAME, for a task or for what examples show."""
    check_name(name)
    check_reference(generator)
    if (task is None) == (examples is None):
        raise UsageError("give either --task or --examples", param_hint="--task")
    if with_adapter is not None:
        if examples is None:
            raise UsageError("--with-adapter goes with --examples", param_hint="--with-adapter")
        check_reference(with_adapter)
    order: dict[str, Any] = {
        "name": name,
        "task": task,
        "examples": lines_of(examples, "bad_examples") if examples is not None else None,
        "with_adapter": with_adapter,
        "statistics_of": statistics_of,
        "seed": seed,
        "reconstruct": reconstruct or None,
    }
    order = {key: value for key, value in order.items() if value is not None}
    with connect(url) as client:
        info, new = client.synthesize(generator, order, replace=replace)
    if as_json:
        say_json(info | {"new": new})
        return
    say_version(info, new)
    sizes = info["provenance"]["sizes"]
    say(f"a recipe of {size(sizes['recipe'])} ({sizes['share']:.2%} of the adapter's {size(sizes['lora'])})")
    for notice in info.get("warnings", ()):
        warn(f"warning: {notice['message']} ({notice['code']})")

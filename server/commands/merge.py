"""`merge`: several adapters made into one by the server."""

from typing import Annotated, Any

import typer

from server.commands.adapters import check_name, check_reference, summary
from server.commands.terminal import (
    DEFAULT_URL,
    JsonOption,
    NameArgument,
    UrlOption,
    UsageError,
    connect,
    key_value,
    say,
    say_json,
    say_version,
)
from server.commands.waiting import tell_job, waited

Method = Annotated[
    str, typer.Option(help="lego, cat, linear, svd, ties, ...: docs/adapters.md names all.", show_default=False)
]
From = Annotated[
    list[str],
    typer.Option("--from", metavar="NAME[:WEIGHT]", help="A source and its weight, 1 if not given; repeat it."),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the result, for methods that take one.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method, or KEY=@FILE of JSON; repeat it."),
]
Replace = Annotated[bool, typer.Option("--replace", help="Make it the next version if the name holds other content.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the new version; Ctrl-C cancels the job.")]


def merge(
    name: NameArgument,
    method: Method,
    sources: From,
    rank: Rank = None,
    parameters: Set = None,
    replace: Replace = False,
    wait: Wait = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Merge the adapters of --from into the next version of NAME."""
    check_name(name)
    told = dict(key_value(text) for text in parameters or ())
    if rank is not None:
        told["rank"] = rank
    order = {"name": name, "method": method, "sources": [_source(text) for text in sources], "parameters": told}
    with connect(url) as client:
        job = client.merge(order, replace=replace)
        if wait:
            job = waited(client, job, f"merge {name}")
        if job["state"] != "done":
            tell_job(job, as_json)
            return
        made = job["result"]
        info = client.adapter(f"{made['name']}@{made['version']}")
    if as_json:
        say_json(info | {"new": made["new"]})
        return
    say_version(info, made["new"])
    say(summary(info))


def _source(text: str) -> dict[str, Any]:
    """`name`, `name@2:0.5`, `sha256:<digest>`, `base:name:-1`: what follows the last colon may be a weight."""
    reference, colon, last = text.rpartition(":")
    weight: float | None = None
    if colon and reference not in ("sha256", "base"):
        try:
            weight = float(last)
        except ValueError:
            weight = None
    if weight is None:
        reference, weight = text, 1.0
    check_reference(reference)
    if not abs(weight) <= 100:
        raise UsageError(f"{text!r}: a weight is a number from -100 to 100", param_hint="--from")
    return {"adapter": reference, "weight": weight}

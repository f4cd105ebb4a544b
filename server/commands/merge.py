"""`merge`: several adapters made into one by the server."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from server.client import Client, ClientError
from server.commands.adapters import check_name, check_reference, summary
from server.commands.terminal import (
    DEFAULT_URL,
    JsonOption,
    NameArgument,
    UrlOption,
    UsageError,
    connect,
    say,
    say_json,
    share_bar,
)

POLL_SECONDS = 0.2
Method = Annotated[
    str, typer.Option(help="lego, cat, linear, svd, ties, ...: the README names all.", show_default=False)
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
    told = dict(_parameter(text) for text in parameters or ())
    if rank is not None:
        told["rank"] = rank
    order = {"name": name, "method": method, "sources": [_source(text) for text in sources], "parameters": told}
    with connect(url) as client:
        job = client.merge(order, replace=replace)
        if wait:
            job = _waited(client, job, f"merge {name}")
        if job["state"] != "done":
            _tell_job(job, as_json)
            return
        made = job["result"]
        info = client.adapter(f"{made['name']}@{made['version']}")
    if as_json:
        say_json(info | {"new": made["new"]})
        return
    say(f"{info['name']}@{info['version']}  {info['digest']}{'' if made['new'] else '  (already there, unchanged)'}")
    say(summary(info))


def _tell_job(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        say_json(job)
    else:
        say(f"job {job['id']}  {job['state']}")


def _waited(client: Client, job: dict[str, Any], label: str) -> dict[str, Any]:
    """The job at its end. Raises ClientError with its error; interrupted, it has the server cancel it."""
    with share_bar(label) as show:
        try:
            while job["state"] in ("queued", "running"):
                show(job["progress"])
                time.sleep(POLL_SECONDS)
                job = client.job(job["id"])
        except KeyboardInterrupt:
            client.cancel_job(job["id"])
            raise
    if job["error"] is not None:
        raise ClientError(job["error"]["message"], job["error"]["code"])
    return job


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


def _parameter(text: str) -> tuple[str, Any]:
    """`density=0.3` as a number, `norm=l2` as a text: JSON where it is some; `examples=@FILE`: JSON of a file."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is no KEY=VALUE", param_hint="--set")
    if value.startswith("@"):
        return key, _json_file(Path(value[1:]))
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _json_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as JSON: {error}", param_hint="--set") from None

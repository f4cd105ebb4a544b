"""What the subcommands share: options, output for people and machines, progress bars."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from server.client import Client, Progress

UrlOption = Annotated[str, typer.Option("--url", envvar="POLYRANK_URL", help="Address of the server.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)]
DEFAULT_URL = "http://127.0.0.1:8000"


class UsageError(typer.BadParameter):
    """A wrong argument: exit code 2."""


def connect(url: str) -> Client:
    """The client for the address, with the key of POLYRANK_API_KEY."""
    import os

    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"{url!r} is not an address: {error}", param_hint="--url / POLYRANK_URL") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{url!r} must begin with http:// or https://", param_hint="--url / POLYRANK_URL")
    key = os.environ.get("POLYRANK_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError("the key holds signs that no key has", param_hint="POLYRANK_API_KEY")
    return Client(url, key or None)


def printable(text: str) -> str:
    """The text without control characters, which could steer a terminal; newline and tab stay."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def say(text: str) -> None:
    """One line to stdout."""
    sys.stdout.write(printable(text) + "\n")


def warn(text: str) -> None:
    """One line to stderr."""
    sys.stderr.write(printable(text) + "\n")


def say_version(info: dict[str, Any], new: bool) -> None:
    """The version that a command has stored, or found to be there already."""
    say(f"{info['name']}@{info['version']}  {info['digest']}{'' if new else '  (already there, unchanged)'}")


def say_json(value: Any) -> None:
    """The value as indented JSON to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def say_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns under their heads, in full width, so that a pipe gets whole names."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def size(count: float) -> str:
    """Bytes in words: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def key_value(text: str) -> tuple[str, Any]:
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


@contextmanager
def share_bar(label: str) -> Iterator[Callable[[float], None]]:
    """A bar with the share that is done, 0 to 1, and the time left on stderr; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=1.0)
        yield lambda done: bars.update(task, completed=done)


@contextmanager
def progress_bar(label: str, after: str) -> Iterator[Progress]:
    """A bar with bytes, rate and time left on stderr; nothing where stderr is no terminal.

    `after` is what happens once all bytes are through, shown until the block ends.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    console = Console(stderr=True)
    with Bars(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True) as bars:
        task = bars.add_task(label, total=None)

        def show(done: int, total: int | None) -> None:
            bars.update(task, completed=done, total=total, description=after if done == total else label)

        yield show

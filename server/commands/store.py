"""`fsck`, `gc`: upkeep of a store, with or without a server on it."""

import errno
import os
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.client import ClientError
from server.commands.terminal import JsonOption, UsageError, progress_bar, say, say_json, size
from server.settings import load, variable

if TYPE_CHECKING:
    from adapters_store.log import Log

SHORTEST_GRACE = 1.0  # hours; only its age tells a file that nobody wants from one whose record is about to be written
StoreOption = Annotated[
    str | None, typer.Option("--store", help=f"The store, as for `serve`. [env: {variable('store')}]", metavar="URL")
]


def fsck(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Read the whole store and report what is damaged or missing; exit code 1 if anything is, or nothing is there."""
    from adapters_store.fsck import check

    address = _address(store)
    log = _opened(address)
    with progress_bar("fsck", "done") as progress:
        report = check(log, progress)
    if not report.versions and log.empty():
        raise _nothing(address)
    if as_json:
        say_json(asdict(report))
    else:
        for problem in report.problems:
            say(f"{problem.where}  {problem.message} ({problem.code})")
        say(f"{report.versions} versions, {report.files} files ({size(report.bytes)}), {len(report.problems)} problems")
        if report.unreferenced:
            say(f"{report.unreferenced} more files belong to no version: see `polyrank gc`")
    if report.problems:
        raise typer.Exit(1)


def gc(
    store: StoreOption = None,
    grace_hours: Annotated[
        float, typer.Option("--grace-hours", help="Spare what was written since.", min=SHORTEST_GRACE)
    ] = 24.0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without, only list them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List, or remove, files that belong to no version of any adapter: what failed uploads left."""
    address = _address(store)
    log = _opened(address)
    found = log.unreferenced(before=datetime.now(UTC) - timedelta(hours=grace_hours))
    if not found and log.empty():
        raise _nothing(address)
    taken = {key: item for key, item in sorted(found.items()) if not delete or log.discard(key, item)}
    total = sum(item.size for item in taken.values())
    if as_json:
        files = [{"key": key, "bytes": item.size, "modified": item.modified.isoformat()} for key, item in taken.items()]
        say_json({"removed": delete, "files": files, "bytes": total})
        return
    for key, item in taken.items():
        say(f"{key}  {size(item.size)}")
    hint = "" if delete or not taken else "; remove them with --delete"
    say(f"{len(taken)} files ({size(total)}) {'removed' if delete else 'belong to no version'}{hint}")


def _address(store: str | None) -> str:
    """The store's URL or folder, which must be there already."""
    address = load({} if store is None else {"store": store}).store
    if address.startswith("memory:"):
        raise UsageError("what is kept in memory ends with its server", param_hint="--store")
    folder = Path(address.removeprefix("file://"))
    if "://" not in str(address.removeprefix("file://")) and not (folder / "lock").is_file():
        raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)}: no adapter store", str(folder))
    return address


def _opened(address: str) -> "Log":
    from adapters_store.log import open_store

    return open_store(address, writing=False)


def _nothing(address: str) -> ClientError:
    """A mistyped prefix of a bucket is as empty as a store that was never used; only a person can tell them apart."""
    text = f"there is nothing at {address}: no version of any adapter, and no file"
    return ClientError(text, "store_empty", hint="check the address, prefix included")

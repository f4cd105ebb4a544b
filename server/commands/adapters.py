"""`push`, `pull`, `ls`, `show`, `rm`: the adapters of a server."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from server.client import ClientError
from server.commands.terminal import (
    DEFAULT_URL,
    JsonOption,
    NameArgument,
    UrlOption,
    UsageError,
    connect,
    progress_bar,
    say,
    say_columns,
    say_json,
    say_version,
    size,
    warn,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONVERT = (
    'convert it once, in that folder, with: python -c "import torch, safetensors.torch as s; '
    "t = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "s.save_file({k: v.contiguous() for k, v in t.items()}, 'adapter_model.safetensors')\""
)


def push(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT folder.", exists=True, file_okay=False)],
    replace: Annotated[bool, typer.Option("--replace", help="Make it the next version if the name exists.")] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Upload the PEFT folder DIR under NAME."""
    check_name(name)
    _check_folder(folder)
    with connect(url) as client, progress_bar(f"push {name}", "the server checks it") as progress:
        info, new = client.upload(name, folder, replace=replace, progress=progress)
    if as_json:
        say_json(info)
        return
    say_version(info, new)
    say(summary(info))
    for notice in info.get("warnings", ()):
        warn(f"warning: {notice['message']} ({notice['code']})")


def pull(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder for it.", show_default=False)],
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Download NAME (or NAME@VERSION) as a PEFT folder DIR, whole or not at all."""
    check_reference(name)
    if there := folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise ClientError(f"{folder} exists and is not an empty folder", "target_exists", hint="name a new folder")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
    # An existing folder is filled, not replaced: it may be somebody's working directory, or a mount.
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=folder if there else folder.parent))
    try:
        with connect(url) as client:
            info = client.adapter(name)
            pinned = f"{info['name']}@{info['version']}"  # both files of one version, whatever is uploaded meanwhile
            for file in (CONFIG, WEIGHTS):
                with (partial / file).open("wb") as target, progress_bar(f"pull {file}", "done") as progress:
                    client.download(pinned, file, target, progress)
        if there:
            _move_in(partial, folder)
        else:
            partial.chmod(0o755)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if as_json:
        say_json(info | {"folder": str(folder)})
    else:
        say(f"{pinned}  {info['digest']}  ->  {folder}")


def _move_in(partial: Path, folder: Path) -> None:
    """The config comes last: without it nobody takes the folder for an adapter."""
    try:
        for file in (WEIGHTS, CONFIG):
            (partial / file).rename(folder / file)
    except BaseException:
        for file in (WEIGHTS, CONFIG):
            (folder / file).unlink(missing_ok=True)
        raise


def ls(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List the adapters."""
    with connect(url) as client:
        infos = list(client.adapters())
    if as_json:
        say_json(infos)
        return
    head = ("NAME", "VERSION", "KIND", "RANK", "SIZE", "MODULES", "RESIDENCY", "DIGEST")
    say_columns(head, [_row(info) for info in infos])


def show(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Show what is known of NAME (or NAME@VERSION)."""
    check_reference(name)
    with connect(url) as client:
        info = client.adapter(name)
    if as_json:
        say_json(info)
        return
    facts = {"name": f"{info['name']}@{info['version']}", "digest": info["digest"], "weights": summary(info)}
    known = {"name", "version", "digest", "kind", "rank", "modules", "bytes", "warnings"}
    facts |= {key: _flat(value) for key, value in info.items() if key not in known and value not in (None, [], {})}
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        say(f"{key.ljust(width)}  {value}")
    for notice in info.get("warnings", ()):
        say(f"{'warning'.ljust(width)}  {notice['message']} ({notice['code']})")


def rm(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Delete NAME, all versions; requests that run on it finish."""
    check_name(name)
    with connect(url) as client:
        client.delete(name)
    if as_json:
        say_json({"deleted": name})
    else:
        say(f"deleted {name}")


def check_reference(reference: str) -> None:
    """Raises UsageError for what can be no reference to an adapter."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@-]*", reference):
        raise UsageError(
            f"{reference!r} is no adapter name: lower case letters, digits, '.', '_' and '-'", param_hint="NAME"
        )


def check_name(name: str) -> None:
    """For what acts on a name with all its versions."""
    check_reference(name)
    if "@" in name or ":" in name:
        raise UsageError(f"{name!r}: give a name, not a version or a digest", param_hint="NAME")


def _check_folder(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise ClientError(f"{folder} holds no {CONFIG}: it is not a PEFT folder", "not_a_peft_folder")
    if (folder / WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise ClientError(
            f"{folder} holds pickled weights (adapter_model.bin), which can run code when they are read",
            "unsupported_format",
            hint=CONVERT,
        )
    raise ClientError(f"{folder} holds no {WEIGHTS}", "not_a_peft_folder")


def _rank(info: dict[str, Any]) -> str:
    rank = info.get("rank") or {}
    low, high = rank.get("min"), rank.get("max")
    if high is None:
        return "-"
    return str(high) if low == high else f"{low}-{high}"


def _modules(info: dict[str, Any]) -> str:
    modules = info.get("modules") or {}
    return f"{modules['matched']}/{modules['total']}" if "matched" in modules else "-"


def summary(info: dict[str, Any]) -> str:
    """Kind, rank, modules and size on one line."""
    return f"{info.get('kind')}, rank {_rank(info)}, modules {_modules(info)}, {size(info.get('bytes') or 0)}"


def _row(info: dict[str, Any]) -> tuple[str, ...]:
    version, digest = str(info["version"]), str(info["digest"])[:12]
    shown = (str(info.get("kind")), _rank(info), size(info.get("bytes") or 0), _modules(info))
    return (str(info["name"]), version, *shown, str(info.get("residency") or "-"), digest)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(_flat(inner) for inner in value)
    return str(value)

"""The `polyrank` command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""

import json
import sys
from collections.abc import Sequence

import typer

from adapters_store.errors import CodedError
from server.client import ClientError
from server.commands import (
    adapters,
    bench,
    compress,
    doctor,
    generate,
    generator,
    keys,
    merge,
    serve,
    store,
    synthesize,
)
from server.commands.terminal import JsonOption, say, say_json, warn
from server.settings import SettingsError

app = typer.Typer(
    help="Serve many LoRA adapters over one base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
for command in (adapters.push, adapters.pull, adapters.ls, adapters.show, adapters.rm):
    app.command(command.__name__)(command)
app.command("compress")(compress.compress)
app.command("merge")(merge.merge)
app.command("generate")(generate.generate)
app.add_typer(generator.app, name="generator")
app.command("synthesize")(synthesize.synthesize)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("fsck")(store.fsck)
app.command("gc")(store.gc)
app.add_typer(keys.app, name="keys")


@app.command("version")
def version(as_json: JsonOption = False) -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    if as_json:
        say_json({"version": installed("polyrank")})
    else:
        say(f"polyrank {installed('polyrank')}")


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        app(list(arguments), prog_name="polyrank")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except SettingsError as error:
        warn(f"error: {error}")
        return 2
    except CodedError as error:  # a server that cannot start: no such model, a store that cannot be opened
        warn(f"error: {error.message} ({error.code})")
        return 1
    except ClientError as error:
        if "--json" in arguments:
            facts = {"message": error.message, "code": error.code, "status": error.status, "hint": error.hint}
            warn(json.dumps({"error": facts}))
        else:
            warn(f"error: {error.line()}")
        return 1
    except OSError as error:
        warn(f"error: {_plain(error)}")
        return 1
    return 0


def _plain(error: OSError) -> str:
    """The system's reason in words, with the file it is about, without error numbers."""
    if error.strerror is None:
        return str(error)
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return reason if error.filename is None else f"{error.filename}: {reason}"


def main() -> None:
    """Entry point of the `polyrank` script."""
    sys.exit(run(sys.argv[1:]))

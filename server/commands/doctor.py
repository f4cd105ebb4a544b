"""`doctor`: what the machine lacks to serve, and how to mend it."""

from collections.abc import Callable
from dataclasses import asdict

import typer

from server.commands import checks
from server.commands.checks import Check, State
from server.commands.terminal import DEFAULT_URL, JsonOption, UrlOption, connect, say, say_json
from server.settings import Settings, SettingsError, load

MARKS = {State.OK: "ok  ", State.WARNING: "warn", State.FAILED: "FAIL"}


def doctor(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Check this machine; exit code 1 if something would stop `polyrank serve`."""
    results = [checks.python(), checks.torch(), checks.compiler()]
    try:
        settings = load()
    except SettingsError as error:
        results.append(Check("settings", State.FAILED, str(error), "correct or unset that variable"))
        settings = None
    if settings is not None:
        results += [check(settings) for check in _OF_SETTINGS]
    with connect(url) as client:
        results.append(checks.server(client))
    if as_json:
        say_json([asdict(result) for result in results])
    else:
        for result in results:
            say(f"{MARKS[result.state]}  {result.name:<8}  {result.found}")
            if result.mend:
                say(f"{'':<16}{result.mend}")
    if any(result.state is State.FAILED for result in results):
        raise typer.Exit(1)


_OF_SETTINGS: tuple[Callable[[Settings], Check], ...] = (checks.memory, checks.model, checks.store, checks.port)

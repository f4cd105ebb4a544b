"""`doctor`: what is wrong with a set-up, and how to mend it."""

from collections.abc import Callable
from dataclasses import asdict

import typer

from server.commands import checks, machine_checks, place_checks
from server.commands.checks import Check, State
from server.commands.terminal import DEFAULT_URL, JsonOption, UrlOption, connect, say, say_json
from server.settings import Settings, SettingsError, load

MARKS = {State.OK: "ok  ", State.WARNING: "warn", State.FAILED: "FAIL"}


def doctor(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Say what is wrong with this machine, the settings and the server at --url; exit code 1 if anything is broken."""
    results = [check() for check in _OF_MACHINE]
    try:
        settings = load()
    except SettingsError as error:
        results.append(Check("settings", State.FAILED, str(error), "correct or unset that variable"))
        settings = None
    if settings is not None:
        results += [check(settings) for check in _OF_SETTINGS]
    with connect(url) as client:
        results.append(place_checks.server(client))
    if as_json:
        say_json([asdict(result) for result in results])
    else:
        for result in results:
            say(f"{MARKS[result.state]}  {result.name:<9}  {result.found}")
            if result.mend:
                say(f"{'':<17}{result.mend}")
    if any(result.state is State.FAILED for result in results):
        raise typer.Exit(1)


_OF_MACHINE: tuple[Callable[[], Check], ...] = (
    machine_checks.python,
    machine_checks.packages,
    checks.torch,
    checks.compiler,
    machine_checks.caches,
    machine_checks.cores,
)
_OF_SETTINGS: tuple[Callable[[Settings], Check], ...] = (
    machine_checks.gpu,
    checks.memory,
    checks.model,
    checks.store,
    place_checks.clock,
    place_checks.redis,
    checks.port,
)

"""`serve`: its options come from `server.settings`, none is written twice."""

import inspect
import json
import shlex
import sys
import threading
import time
from typing import Annotated, Any

import typer

from server.commands.checks import why_not_bind
from server.settings import Settings, facts, flag, load, variable

# The example adapter of deploy/examples that the first curl shows where it is preloaded.
EXAMPLE = ("legal-v2", "Plain: The tenant owes the landlord 500 euros, due 30 days after notice.\nClause:")


def serve(**flags: str | bool | None) -> None:
    """Start the server."""
    settings = load({name: value for name, value in flags.items() if value is not None})
    if (problem := why_not_bind(settings)) is not None:
        raise OSError(f"cannot listen on {settings.host}:{settings.port}: {problem}; choose another --port")
    from server.app import run  # torch and the model code are imported only here

    threading.Thread(target=_announce, args=(settings,), daemon=True).start()
    run(settings)


def _parameter(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    shown = f"{field.description} [env: {variable(name)}; default: {facts(field)['shown']}]"
    if field.annotation is bool:
        option = typer.Option(f"{flag(name)}/--no-{name.replace('_', '-')}", help=shown)
        kind: Any = Annotated[bool | None, option]
    else:
        option = typer.Option(flag(name), help=shown, metavar=facts(field)["metavar"])
        kind = Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


_parameters = [_parameter(name) for name in Settings.model_fields]
serve.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters}


def first_curl(settings: Settings) -> str:
    """A command that answers at once: with the example adapter where it is preloaded, else with the base model."""
    name, prompt = EXAMPLE
    adapter = settings.preload is not None and (settings.preload / name).is_dir()
    query = f"?adapter={name}" if adapter else ""
    body = {
        "inputs": prompt if adapter else "The capital of France is",
        "parameters": {"max_new_tokens": 40, "stop": ["\n"]},
    }
    key = '-H "Authorization: Bearer $POLYRANK_API_KEY" ' if settings.api_keys is not None else ""
    return (
        f"curl -s {key}{shlex.quote(f'{settings.address}/generate{query}')} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )


def _announce(settings: Settings) -> None:
    """Waits until the server is ready, then prints where it is and what to try first."""
    from server.client import Client

    with Client(settings.address) as client:
        while not client.ready():
            time.sleep(0.2)
    sys.stdout.write(f"\nPolyrank is ready at {settings.address}\nTry:\n  {first_curl(settings)}\n\n")
    sys.stdout.flush()

"""`generate`: one answer, as it is written."""

import sys
from typing import Annotated, Any

import typer

from server.commands.terminal import DEFAULT_URL, JsonOption, UrlOption, connect, printable, say_json


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from stdin.", show_default=False)],
    adapter: Annotated[str | None, typer.Option(help="Adapter to use; without it the base model answers.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a drawn answer repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text at which the answer ends; may be repeated.")] = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Write an answer to PROMPT."""
    text = sys.stdin.read() if prompt == "-" else prompt
    parameters: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        parameters["temperature"] = temperature
    parameters |= {key: value for key, value in (("seed", seed), ("stop", stop)) if value not in (None, [])}
    last = ""
    with connect(url) as client:
        for event, headers in client.generate(text, adapter, parameters):
            if not as_json:
                last = _write(event.get("token") or {}) or last
            elif event.get("generated_text") is not None:
                say_json(event | {"adapter": headers.get("x-adapter"), "digest": headers.get("x-adapter-digest")})
    if not as_json and not last.endswith("\n"):
        sys.stdout.write("\n")


def _write(token: dict[str, Any]) -> str:
    """Writes and returns the event's text; those of all events join to the answer."""
    text = str(token.get("text", ""))
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
    return text

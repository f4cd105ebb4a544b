"""Logging: one line per event, as text for people or JSON for machines; never a prompt, an answer or a key."""

import logging
import sys
from typing import Literal

import structlog

from server.api.current import CURRENT

# Fields that logging (and uvicorn, for terminals) sets on a record; what else is there came from `extra=` and is shown.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Send every log line to stderr through structlog. Called once, by `server.app.run`."""
    shared: list[structlog.types.Processor] = [
        _request,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    text = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    renderers = [structlog.processors.JSONRenderer()] if form == "json" else [_escaped, text]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_extras, *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _request(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """The id and the trace of the request on whose way the line was written. The engine's lines have ids of their own,
    which begin with the request's."""
    if (current := CURRENT.get()) is not None:
        event.setdefault("request_id", current.request_id)
        if current.trace_id:
            event["trace_id"] = current.trace_id
    return event


def _extras(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """Show what `extra=` brought; the facts of an answered request stand beside one another, not in a mapping."""
    record: logging.LogRecord = event["_record"]
    for name, value in getattr(record, "answer", {}).items():
        event.setdefault(name, value)
    for name, value in vars(record).items():
        if name != "answer" and name not in _STANDARD and not name.startswith("_"):
            event.setdefault(name, value)
    return event


def _escaped(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """Escape what a terminal obeys or does not show: names come from clients. JSON escapes by itself."""
    for name, value in event.items():
        if isinstance(value, str):
            text = value.rstrip() if name == "event" else value
            lines = text.split("\n") if name == "exception" else [text]
            event[name] = "\n".join("".join(map(_shown, line)) for line in lines)
    return event


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")

"""Logging: one line per event, as text for people or JSON for machines; never a prompt."""

import logging
import sys
from typing import Literal

import structlog

# Fields that logging (and uvicorn, for terminals) sets on a record; what else is there came from `extra=` and is shown.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Send every log line to stderr through structlog. Called once, by `server.app.run`."""
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    text = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    renderers = [structlog.processors.JSONRenderer()] if form == "json" else [_escaped, text]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, _extras],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


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

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
    renderer: structlog.types.Processor = structlog.processors.JSONRenderer() if form == "json" else text
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, _extras],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
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

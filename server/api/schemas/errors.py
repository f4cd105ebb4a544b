"""The two bodies an error may have."""

from typing import Any

from pydantic import BaseModel

from server.api.errors import ERROR_TYPES


class ErrorDetail(BaseModel):
    """`code` is stable and meant for programs; `message` is for people."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class TgiErrorAnswer(BaseModel):
    """TGI's shape, on `/`, `/generate` and `/generate_stream`."""

    error: str
    error_type: str


Responses = dict[int | str, dict[str, Any]]


def error_responses(*statuses: int, model: type[BaseModel] = ErrorAnswer) -> Responses:
    """For a route's `responses=`."""
    return {
        status: {"model": model, "description": ERROR_TYPES.get(status, "InternalServerError")} for status in statuses
    }


GENERATION_ERRORS = error_responses(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
EVENT_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}
TGI_ERRORS = error_responses(400, 401, 403, 404, 408, 413, 415, 422, 424, 429, 500, 503, model=TgiErrorAnswer)
JSON_ERRORS = error_responses(400, 401, 403, 404, 408, 413, 415, 422, 503)
READ_ERRORS = error_responses(400, 401, 403, 404, 422, 503)

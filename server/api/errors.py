"""Errors that only HTTP knows, and the one place where any error becomes an answer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapters_store.errors import CodedError
from server.errors import EngineFailure, InvalidRequest, ModelOutputInvalid, Overloaded

TGI_PATHS = frozenset({"/", "/generate", "/generate_stream"})

# The names vLLM's clients know; `code` is the stable one.
ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    412: "PreconditionFailedError",
    413: "PayloadTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    499: "ClientClosedRequestError",
    503: "ServiceUnavailableError",
    507: "InsufficientStorageError",
}
RETRYABLE = frozenset(
    {
        *(
            "overloaded",
            "not_ready",
            "engine_failure",
            "request_aborted",
            "unhealthy",
            "engine_stopped",
            "engine_stuck",
        ),
        *("store_unavailable", "store_denied", "store_not_found"),
    }
)
HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "upload_too_large", 415: "unsupported_media_type"}


class BadBody(InvalidRequest):
    """The body is no JSON object that can be read (400)."""

    code = "invalid_json"


class UnsupportedMediaType(CodedError):
    """The body has another content type than the route reads (415)."""

    status = 415
    code = "unsupported_media_type"


class BadUpload(CodedError):
    """The multipart body has missing, extra, repeated or malformed parts (400)."""

    status = 400
    code = "bad_upload"


class UploadRefused(CodedError):
    """The upload was read and refused: a forbidden part or another digest (422)."""

    status = 422
    code = "unexpected_file"


class UploadIncomplete(CodedError):
    """The body stopped arriving, or arrives too slowly (408)."""

    status = 408
    code = "upload_incomplete"


class SourceNotAllowed(CodedError):
    """An adapter may not be read from there (403)."""

    status = 403
    code = "source_not_allowed"


class OriginNotAllowed(CodedError):
    """A web page of another host wants to change something (403)."""

    status = 403
    code = "origin_not_allowed"


class BadHost(CodedError):
    """The `Host` header names a server that this one is not (400)."""

    status = 400
    code = "bad_host"


class AlreadyLoaded(CodedError):
    """vLLM's answer to loading a name twice (400)."""

    status = 400
    code = "adapter_exists"
    error_type = "InvalidUserInput"


class RequestAborted(CodedError):
    """The server ended the request before it was finished, as when it stops (503)."""

    status = 503
    code = "request_aborted"
    retry_after = 2.0


class Unhealthy(CodedError):
    """The engine does not step any more (503)."""

    status = 503
    code = "unhealthy"


class ClientGone(CodedError):
    """Nobody waits for the answer any more (499, seen in logs and metrics only)."""

    status = 499
    code = "client_disconnected"


class UnexpectedError(CodedError):
    """A fault of ours (500). The cause is in the log, never in the answer."""

    def __init__(self) -> None:
        super().__init__(
            "The server failed on this request. The fault is logged under the X-Request-Id of this answer."
        )


def coded(error: Exception) -> CodedError:
    """Any exception as one of the tree."""
    if isinstance(error, CodedError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        answer = CodedError(str(error.detail), code=HTTP_CODES.get(error.status_code, "invalid_request"))
        answer.status = error.status_code
        return answer
    return UnexpectedError()


def _invalid(problems: Sequence[Any]) -> CodedError:
    """The first three problems in words; the values sent are not repeated."""
    texts = []
    for problem in problems[:3]:
        message = str(problem["msg"]).removeprefix("Value error, ")
        texts.append(f"{field_name(problem['loc']) or 'body'}: {message}")
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return InvalidRequest("; ".join(texts) + more, param=field_name(problems[0]["loc"]) if problems else None)


def field_name(location: Sequence[Any]) -> str | None:
    """`parameters.stop.0` from ("body", "parameters", "stop", 0); the names of union branches are left out."""
    parts = [str(part) for part in location[1:] if not str(part).startswith(("function-", "union[", "list["))]
    return ".".join(parts)[:200] or None


def stopped() -> RequestAborted:
    return RequestAborted("The server stopped before this request was finished. Send it again.")


def is_tgi(request: Request) -> bool:
    return request.url.path in TGI_PATHS


def openai_body(error: CodedError) -> dict[str, Any]:
    fallback = ERROR_TYPES.get(error.status, "InternalServerError" if error.status >= 500 else "BadRequestError")
    kind = getattr(error, "error_type", fallback)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def tgi_body(error: CodedError) -> dict[str, Any]:
    return {"error": error.message, "error_type": _tgi_type(error)}


def _tgi_type(error: CodedError) -> str:
    if isinstance(error, InvalidRequest):
        return "validation"
    if isinstance(error, Overloaded) or error.status == 429:
        return "overloaded"
    if isinstance(error, EngineFailure | ModelOutputInvalid):
        return "generation"
    if isinstance(error, RequestAborted):
        return "incomplete_generation"
    return error.code


def _tgi_status(error: CodedError) -> int:
    """TGI's own statuses where its clients act on them; unreadable bodies and conflicting names stay 400."""
    if isinstance(error, InvalidRequest) and error.code not in ("invalid_json", "adapter_conflict"):
        return 422
    if isinstance(error, Overloaded):
        return 429
    if isinstance(error, EngineFailure | ModelOutputInvalid):
        return 424
    return error.status


def error_headers(error: CodedError, status: int) -> dict[str, str]:
    headers = {}
    if status == 409 or (status >= 500 and error.code not in RETRYABLE):
        # openai's client repeats these by itself; the same request would fail the same way.
        headers["x-should-retry"] = "false"
    elif status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 1.0)))
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="polyrank"'
    if status in (408, 413):
        headers["Connection"] = "close"
    return headers


def error_response(request: Request, error: CodedError, extra: Mapping[str, str] | None = None) -> JSONResponse:
    tgi = is_tgi(request)
    status = _tgi_status(error) if tgi else error.status
    body = tgi_body(error) if tgi else openai_body(error)
    headers = {**error_headers(error, status), **(extra or {})}
    request.scope["polyrank.error_code"] = error.code
    return JSONResponse(body, status_code=status, headers=headers)

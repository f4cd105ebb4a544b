"""The exception tree of the service; each class has its HTTP status and stable code. One handler answers them all."""

import math

from adapters_store.errors import CodedError


class InvalidRequest(CodedError):
    """A field of the request is missing, malformed or out of bounds (400)."""

    status = 400
    code = "invalid_parameter"


class ContextTooLong(InvalidRequest):
    """Prompt and new tokens do not fit the context (400)."""

    code = "context_length_exceeded"


class GrammarTooComplex(InvalidRequest):
    """The grammar cannot be followed within the limits of its matcher, which may show in mid-answer (400)."""

    code = "grammar_too_complex"


class PayloadTooLarge(CodedError):
    """The body is larger than allowed (413)."""

    status = 413
    code = "upload_too_large"


class Overloaded(CodedError):
    """The queue is full (503, with Retry-After in seconds)."""

    status = 503
    code = "overloaded"
    retry_after = 1.0


class RateLimited(CodedError):
    """The client has sent as many requests as it may in a time (429, with Retry-After in seconds)."""

    status = 429
    code = "rate_limited"
    unit = "requests"

    def __init__(self, limit: str, seconds: float) -> None:
        """limit: as it is written, `60/minute`."""
        super().__init__(f"The limit of {self.unit} is {limit}, and it is used up; more in {math.ceil(seconds)} s.")
        self.retry_after = seconds


class TokenLimited(RateLimited):
    """The key has used as many tokens, of prompts and answers, as it may in a time (429, with Retry-After)."""

    code = "token_limited"
    unit = "tokens"


class MissingKey(CodedError):
    """The server has API keys and the request brought none (401)."""

    status = 401
    code = "missing_api_key"

    def __init__(self) -> None:
        super().__init__("This server asks for an API key: send the header `Authorization: Bearer <key>`.")


class InvalidKey(CodedError):
    """The request's API key is none of this server's, or no longer (401). The answer does not say why.

    key_id: of a key that was right once and is revoked or expired, for the log.
    """

    status = 401
    code = "invalid_api_key"

    def __init__(self, key_id: str | None = None) -> None:
        super().__init__("The API key is not valid: mistyped, revoked or expired.")
        self.key_id = key_id


class MissingScope(CodedError):
    """The API key may not do this (403)."""

    status = 403
    code = "missing_scope"


class NotReady(CodedError):
    """The server is starting or draining (503)."""

    status = 503
    code = "not_ready"
    retry_after = 2.0


class EngineStopped(NotReady):
    """The engine has ended, with its server or by a fault (503)."""

    code = "engine_stopped"


class EngineStuck(NotReady):
    """The engine makes no step (503)."""

    code = "engine_stuck"
    retry_after = 10.0


class EngineFailure(CodedError):
    """The engine could not finish this request (500)."""

    code = "engine_failure"


class ModelOutputInvalid(CodedError):
    """The model produced NaN logits for this request (500)."""

    code = "model_output_invalid"

"""Errors that reach a user: each carries an HTTP status, a stable code, and the field at fault."""

import errno
import os


class CodedError(Exception):
    """Base of every error that Polyrank answers with.

    The message says what is wrong, where, which limit holds and how to mend it; it never names a path.
    """

    status = 500
    code = "internal_error"
    retry_after: float | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param


class AdapterInvalid(CodedError):
    """The uploaded adapter cannot be served (422); `code` says why."""

    status = 422
    code = "bad_config"


class KnobRefused(CodedError):
    """A request chooses what this adapter does not let it choose, or a value that it does not have (422)."""

    status = 422
    code = "knob_unsupported"


class UnsupportedFormat(CodedError):
    """The file is not safetensors (415)."""

    status = 415
    code = "unsupported_format"


class AdapterNotFound(CodedError):
    """No such adapter, version or digest (404)."""

    status = 404
    code = "model_not_found"


class NameExpected(CodedError):
    """A version or a digest was given where only a whole name can be meant (400)."""

    status = 400
    code = "name_expected"


class AdapterConflict(CodedError):
    """The name holds other content, or `If-Match` names another digest (409 or 412)."""

    status = 409
    code = "adapter_exists"


class PreconditionFailed(CodedError):
    """`If-Match` does not name the current digest (412)."""

    status = 412
    code = "digest_changed"


class AdapterCorrupt(CodedError):
    """A stored file no longer has its digest (503)."""

    status = 503
    code = "adapter_corrupt"


class StorageFull(CodedError):
    """The store refuses to write: disk full or failing (507)."""

    status = 507
    code = "storage_full"


class StoreUnavailable(CodedError):
    """The store cannot be used at this moment (503, with Retry-After in seconds)."""

    status = 503
    code = "store_unavailable"
    retry_after = 2.0

    @property
    def refused(self) -> bool:
        """The store answered, and its answer was no."""
        return self.code != StoreUnavailable.code


class OutcomeUnknown(StoreUnavailable):
    """The store did not answer, so that a change may have been made or not (503).

    An upload that is sent again finds its own content. What else was done cannot be told from what others did since:
    a deletion sent again could take their upload, a compression finds its own result and is refused.
    """

    def __init__(self) -> None:
        super().__init__(
            "The adapter store did not answer, so that this was done, or not. Look which version is current; "
            "only an upload may simply be sent again."
        )


def write_error(error: Exception, place: str = "adapter store") -> StorageFull | StoreUnavailable:
    """Why a write failed, without paths: only a full or failing disk is 507; too few descriptors, say, will pass."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return StorageFull(f"The {place} is full; enlarge it. Nothing was changed.")
    if number == errno.EIO:
        return StorageFull(f"The {place} could not be written: its disk is failing. Nothing was changed.")
    return StoreUnavailable(f"The {place} cannot be used now{_reason(number)}. Nothing was changed; try again.")


def read_error(error: OSError, what: str) -> AdapterCorrupt | StoreUnavailable:
    """Why a stored file could not be read. Only a failing disk is damage: other errors say nothing of the file."""
    if error.errno == errno.EIO:
        return damaged(what)
    return StoreUnavailable(f"The adapter store cannot be read now{_reason(error.errno)}; try again.")


def damaged(what: str) -> AdapterCorrupt:
    return AdapterCorrupt(f"A stored {what} of this adapter is damaged or missing; upload the adapter again.")


def _reason(number: int | None) -> str:
    return f" ({os.strerror(number)})" if number else ""

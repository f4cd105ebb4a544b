"""Names of adapters and the ways to refer to one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from adapters_store.canonical import shorten
from adapters_store.errors import AdapterConflict, AdapterInvalid, AdapterNotFound, NameExpected, PreconditionFailed

PUBLIC = "public"  # the tenant whose adapters everybody may read
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
# TGI's and Hugging Face's chat clients send `tgi` and `dummy` as the model when they mean the base.
_RESERVED = frozenset({"base", "__base__", "tgi", "dummy"})
_NAME = re.compile(NAME[1:-1])
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")


@dataclass(frozen=True, slots=True)
class Reference:
    """`name`, `name@3` or `sha256:<digest>`: either `digest` or `name` is set."""

    name: str | None = None
    version: int | None = None
    digest: str | None = None


def check_name(name: str, *base_names: str, what: str = "adapter") -> None:
    """Raises AdapterInvalid `bad_name`; any name that passes is also a safe path segment. what: is to be named."""
    if not _NAME.fullmatch(name):
        problem = f"must match {NAME}"
    elif name in _RESERVED or name in {each.lower() for each in base_names}:
        problem = "means the base model"
    else:
        return
    raise AdapterInvalid(f"The {what} name `{shorten(name)}` {problem}.", code="bad_name", param="name")


def require_name(reference: str) -> None:
    """Raises NameExpected for a version or a digest where all versions of a name are meant."""
    if {"@", ":"} & set(reference):
        text = (
            f"This acts on all versions and takes an adapter's name, not a version or a digest: `{shorten(reference)}`."
        )
        raise NameExpected(text, param="name")


def check_tenant(tenant: str) -> None:
    if not _TENANT.fullmatch(tenant):
        raise ValueError("a tenant is one path segment of letters, digits, `_` and `-`")


def parse(reference: str, *base_names: str) -> Reference:
    """Takes a reference apart; `base:name` is `name`, with any of the base's names for `base`.

    Raises AdapterNotFound where it can name nothing.
    """
    if reference.startswith("sha256:"):
        digest = reference.removeprefix("sha256:")
        if _DIGEST.fullmatch(digest):
            return Reference(digest=digest)
        raise not_found(reference)
    prefix, colon, rest = reference.rpartition(":")
    if colon and prefix not in ("base", *base_names):
        raise not_found(reference)
    name, at, version = rest.partition("@")
    if not _NAME.fullmatch(name) or (at and not _VERSION.fullmatch(version)):
        raise not_found(reference)
    return Reference(name=name, version=int(version) if at else None)


def not_found(reference: str, near: list[str] | None = None) -> AdapterNotFound:
    """vLLM's text, then the nearest names."""
    hint = f" Did you mean {', '.join(f'`{name}`' for name in near)}?" if near else ""
    return AdapterNotFound(f"The model `{shorten(reference)}` does not exist.{hint}", param="model")


def deleted(reference: str, name: str, version: int) -> AdapterNotFound:
    """For a name that was deleted; `version` is the one to go back to."""
    return AdapterNotFound(
        f"The model `{shorten(reference)}` was deleted. `POST /adapters/{name}/rollback` with "
        f'`{{"version": {version}}}` restores it.',
        param="model",
    )


def check_match(current: str | None, if_match: str | None) -> None:
    """Raises PreconditionFailed unless `if_match` (as in HTTP; None: no condition) names the current digest."""
    if if_match is None:
        return
    wanted = if_match.strip().removeprefix("W/").strip('"').removeprefix("sha256:")
    if current is None or wanted not in ("*", current):
        found = f"holds {current}" if current is not None else "does not exist"
        raise PreconditionFailed(f"`If-Match` names another digest: the adapter {found}.", param="If-Match")


def busy(name: str) -> AdapterConflict:
    """For a writer that has lost too many races."""
    return AdapterConflict(f"`{name}` is being changed by others at this moment; try again.", param="name")


def taken(name: str, version: int, digest: str | None) -> AdapterConflict:
    """For other content where neither `if_match` nor `replace` was given."""
    return AdapterConflict(
        f"`{name}` holds other content (version {version}, digest {digest}). Send `If-Match` with that digest, or "
        "`?replace=true`.",
        param="name",
    )


def no_file(filename: str, files: Iterable[str]) -> AdapterNotFound:
    """For an adapter that is there and has other files."""
    text = f"The adapter has no file `{shorten(filename)}`; it has {', '.join(files)}."
    return AdapterNotFound(text, code="file_not_found")

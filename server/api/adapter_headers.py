"""Names in paths, and the digests in If-Match and ETag."""

import re
from typing import Annotated, Literal, Protocol

from fastapi import Header, Path, Response

from server.errors import InvalidRequest

NamePath = Annotated[str, Path(max_length=512, description="Name of an adapter.")]
ReferencePath = Annotated[str, Path(max_length=512, description="`name`, `name@version` or `sha256:<digest>`.")]
IfMatch = Annotated[str | None, Header(max_length=256, description='The digest that must be current: `"<digest>"`.')]

_TAG = re.compile(r'"(?:sha256:)?([0-9a-f]{64})"')


def digest_of(if_match: str | None) -> str | None:
    """The digest in an If-Match header; `*`, any current one, as it is (RFC 9110 section 13.1.1)."""
    if if_match is None or if_match.strip() == "*":
        return if_match and "*"
    if not (match := _TAG.fullmatch(if_match.strip())):
        text = 'If-Match must be `*` or one digest in quotes: "<64 hexadecimal digits>".'
        raise InvalidRequest(text, param="If-Match")
    return match[1]


class Version(Protocol):
    """A version of an adapter or of a generator."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def digest(self) -> str: ...


def point_to(response: Response, place: Literal["adapters", "generators"], stored: Version) -> None:
    """Says in the headers which version was stored, or is there already, and where."""
    response.headers["ETag"] = etag(stored.digest)
    response.headers["Location"] = f"/{place}/{stored.name}@{stored.version}"


def etag(digest: str) -> str:
    return f'"{digest}"'

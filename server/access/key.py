"""An API key: what it may do, for which tenant, and how it is kept.

A key is `pr_`, eight characters that with it are its id for people and lists, and 256 random bits. Only its SHA-256 is
kept: what is that random needs no slow hash.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters_store.names import PUBLIC, check_tenant
from adapters_store.quota import Quota
from server.errors import InvalidKey
from server.replicas.rate import Rate

Scope = Literal["generate", "adapters:read", "adapters:write", "admin", "metrics"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
MAX_BYTES = 16 << 20  # of all keys of a server: some 40,000
_ID = r"pr_[a-z2-7]{8}"
_KEY = re.compile(rf"({_ID})_[A-Za-z0-9_-]{{43}}")
_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
_NO_HASH = "0" * 64  # what a key is compared with that nobody has, so that it takes as long


class KeysInvalid(ValueError):
    """What should hold the keys does not; the message repeats nothing of it."""


def _tenant(value: str) -> str:
    check_tenant(value)
    return value


def _rate(value: str) -> str:
    Rate.parse(value)
    return value


Tenant = Annotated[str, AfterValidator(_tenant)]
Limit = Annotated[str, AfterValidator(_rate)]


class Key(BaseModel):
    """One key. sha256: of the whole key, hexadecimal; rate_limit, token_limit: as `Rate.parse` reads them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=f"^{_ID}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tenant: Tenant = PUBLIC
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    rate_limit: Limit | None = None
    token_limit: Limit | None = None
    note: Annotated[str, Field(max_length=200)] = ""

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


class TenantQuota(BaseModel):
    """What a tenant may keep; None for no bound. See `adapters_store.quota`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: Annotated[int, Field(ge=0)] | None = None
    bytes: Annotated[int, Field(ge=0)] | None = None


class Keyring(BaseModel):
    """All keys of a server, revoked ones too, and the quotas of tenants."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    keys: tuple[Key, ...] = ()
    quotas: dict[Tenant, TenantQuota] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> "Keyring":
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have one id")
        return self

    def with_key(self, key: Key) -> "Keyring":
        return self.model_copy(update={"keys": (*(each for each in self.keys if each.id != key.id), key)})

    def with_quota(self, tenant: str, quota: TenantQuota) -> "Keyring":
        return self.model_copy(update={"quotas": {**self.quotas, tenant: quota}})

    def find(self, key_id: str) -> Key | None:
        return next((key for key in self.keys if key.id == key_id), None)


def encode(ring: Keyring) -> bytes:
    return ring.model_dump_json(indent=1, exclude_none=True).encode() + b"\n"


def decode(data: bytes) -> Keyring:
    """Raises KeysInvalid."""
    if len(data) > MAX_BYTES:
        raise KeysInvalid(f"it is larger than {MAX_BYTES} bytes")
    try:
        return Keyring.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KeysInvalid(f"{where}: {first['msg']}" if where else str(first["msg"])) from None


def new_secret(ring: Keyring) -> tuple[str, str]:
    """A key that nobody has yet, to be shown once, and its id."""
    taken = {key.id for key in ring.keys}
    while (key_id := "pr_" + "".join(secrets.choice(_LETTERS) for _ in range(8))) in taken:
        pass
    return f"{key_id}_{secrets.token_urlsafe(32)}", key_id


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="backslashreplace")).hexdigest()


class KeyTable:
    """The keys of one moment, to be looked up. Immutable."""

    def __init__(self, ring: Keyring) -> None:
        self._keys = {key.id: key for key in ring.keys}
        self._quotas: Mapping[str, Quota] = MappingProxyType(
            {tenant: Quota(quota.adapters, quota.bytes) for tenant, quota in ring.quotas.items()}
        )

    def find(self, secret: str, now: datetime) -> Key:
        """The active key that this text is. Raises InvalidKey, the same for every reason, after equally long."""
        form = _KEY.fullmatch(secret)
        key = self._keys.get(form[1]) if form else None
        if not hmac.compare_digest(digest(secret), key.sha256 if key else _NO_HASH) or key is None:
            raise InvalidKey
        if key.state(now) != "active":
            raise InvalidKey(key.id)
        return key

    def quota(self, tenant: str) -> Quota | None:
        return self._quotas.get(tenant)

    def active(self, now: datetime) -> int:
        return sum(key.state(now) == "active" for key in self._keys.values())


@dataclass(frozen=True, slots=True)
class KeyState:
    """active: keys that are valid now; stale: whether the last reading failed, so that an earlier state holds."""

    active: int
    stale: bool


def utc_now() -> datetime:
    return datetime.now(UTC)

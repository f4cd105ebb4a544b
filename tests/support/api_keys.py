"""API keys of a test, in memory: each made by name, found as a server finds them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from server.access.key import SCOPES, Key, Keyring, KeyTable, digest, new_secret, utc_now

YESTERDAY = datetime.now(UTC) - timedelta(days=1)


class ApiKeys:
    """`make` gives the secret of a new key; keyword arguments are fields of `Key`."""

    def __init__(self) -> None:
        self.ring = Keyring()

    def make(self, *scopes: str, **facts: Any) -> str:
        secret, key_id = new_secret(self.ring)
        told = {"created": YESTERDAY, "scopes": scopes or SCOPES, **facts}
        self.ring = self.ring.with_key(Key(id=key_id, sha256=digest(secret), **told))
        return secret

    def find(self, secret: str) -> Key:
        return KeyTable(self.ring).find(secret, utc_now())


def bearer(secret: str | None) -> dict[str, str]:
    return {} if secret is None else {"Authorization": f"Bearer {secret}"}

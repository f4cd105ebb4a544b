"""`keys`: the API keys of a server, in the file or the Redis that its --api-keys names. The server need not run."""

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.client import ClientError
from server.commands.terminal import JsonOption, UsageError, say, say_columns, say_json, warn
from server.settings import load, variable

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.access.key import Key, Keyring, TenantQuota

SECONDS = {"m": 60, "h": 3600, "d": 86400}
app = typer.Typer(
    help="Make, list and revoke API keys, and bound what tenants keep.", no_args_is_help=True, rich_markup_mode=None
)

Place = Annotated[
    str | None,
    typer.Option("--api-keys", help=f"As for `serve`. [env: {variable('api_keys')}]", metavar="FILE|URL"),
]
Tenant = Annotated[str, typer.Option(help="Whose adapters it has beside the public ones, and where it writes.")]
MaxAdapters = Annotated[int | None, typer.Option(min=0, help="Adapters that the tenant may have.")]
MaxBytes = Annotated[
    str | None, typer.Option(metavar="BYTES", help="Of all versions that the tenant keeps, such as 10GiB.")
]
ScopeOption = Annotated[
    list[str] | None,
    typer.Option("--scope", help="generate (the default), adapters:read, adapters:write, admin or metrics; repeat it."),
]
Expires = Annotated[str | None, typer.Option(metavar="WHEN", help="In 90d, 12h or 30m, or at 2027-01-31T00:00Z.")]
RateOption = Annotated[str | None, typer.Option(metavar="RATE", help="Requests that it may send, such as 60/minute.")]
TokenOption = Annotated[str | None, typer.Option(metavar="RATE", help="Tokens that it may use, such as 100000/hour.")]


@app.command()
def add(
    scopes: ScopeOption = None,
    tenant: Tenant = "public",
    expires: Expires = None,
    rate_limit: RateOption = None,
    token_limit: TokenOption = None,
    note: Annotated[str, typer.Option(help="What it is for; shown by `keys ls`.")] = "",
    max_adapters: MaxAdapters = None,
    max_bytes: MaxBytes = None,
    place: Place = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, this once. Bounds of the tenant hold for all its keys."""
    from server.access.key import Key, digest, new_secret, utc_now

    facts: dict[str, Any] = {
        "tenant": tenant,
        "scopes": frozenset(scopes or ["generate"]),
        "created": utc_now(),
        "expires": _expiry(expires),
        "rate_limit": rate_limit,
        "token_limit": token_limit,
        "note": note,
    }
    quota = _quota(max_adapters, max_bytes)
    made: list[tuple[str, Key]] = []

    def edit(ring: "Keyring") -> "Keyring":
        secret, key_id = new_secret(ring)
        key = _checked(Key, id=key_id, sha256=digest(secret), **facts)
        made.append((secret, key))
        return (ring if quota is None else ring.with_quota(tenant, quota)).with_key(key)

    _change(place, edit)
    secret, key = made[-1]
    if as_json:
        say_json({"key": secret, **_facts(key)})
    else:
        say(secret)
        warn(f"{key.id}: tenant {key.tenant}, {_scopes(key)}. It is not shown again: only its hash is kept.")


@app.command()
def ls(place: Place = None, as_json: JsonOption = False) -> None:
    """List the keys, without the keys themselves, and the bounds of tenants."""
    from server.access.key import KeysInvalid

    try:
        ring = _place(place).read()
    except KeysInvalid as error:
        raise _unreadable(error) from None
    if as_json:
        quotas = {tenant: quota.model_dump() for tenant, quota in ring.quotas.items()}
        say_json({"keys": [_facts(key) for key in ring.keys], "quotas": quotas})
        return
    head = ("ID", "STATE", "TENANT", "SCOPES", "CREATED", "EXPIRES", "LIMITS", "NOTE")
    say_columns(head, [_row(key) for key in ring.keys])
    for tenant, quota in ring.quotas.items():
        bounds = [f"{quota.adapters} adapters"] if quota.adapters is not None else []
        bounds += [f"{quota.bytes} bytes"] if quota.bytes is not None else []
        say(f"tenant {tenant}: at most {' and '.join(bounds) or 'anything'}")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys ls` shows it.", show_default=False)],
    place: Place = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke a key: running servers refuse it within 2 seconds. Requests that run finish."""
    from server.access.key import utc_now

    now = utc_now()

    def edit(ring: "Keyring") -> "Keyring":
        key = ring.find(key_id)
        if key is None:
            raise ClientError(f"there is no key {key_id}", "no_such_key", hint="`polyrank keys ls` shows all")
        return ring.with_key(key.model_copy(update={"revoked": key.revoked or now}))

    key = _change(place, edit).find(key_id)
    assert key is not None
    if as_json:
        say_json(_facts(key))
    else:
        say(f"revoked {key.id}")


@app.command()
def quota(
    tenant: Annotated[str, typer.Argument(help="The tenant.", show_default=False)],
    max_adapters: MaxAdapters = None,
    max_bytes: MaxBytes = None,
    place: Place = None,
    as_json: JsonOption = False,
) -> None:
    """Set what a tenant may keep; what is not given is not bounded."""
    from server.access.key import Keyring, TenantQuota

    wanted = _quota(max_adapters, max_bytes) or TenantQuota()
    _checked(Keyring, quotas={tenant: wanted})
    _change(place, lambda ring: ring.with_quota(tenant, wanted))
    if as_json:
        say_json({"tenant": tenant, **wanted.model_dump()})
    else:
        say(f"tenant {tenant}: {_bound(wanted.adapters)} adapters, {_bound(wanted.bytes)} bytes")


def _place(place: str | None) -> Any:
    from server.access.keeper import place_of

    address = load({} if place is None else {"api_keys": place}).api_keys
    if address is None:
        raise UsageError("say where the keys are", param_hint=f"--api-keys / {variable('api_keys')}")
    return place_of(address)


def _change(place: str | None, edit: "Callable[[Keyring], Keyring]") -> "Keyring":
    from server.access.key import KeysInvalid

    try:
        ring: Keyring = _place(place).change(edit)
    except KeysInvalid as error:
        raise _unreadable(error) from None
    return ring


def _unreadable(error: Exception) -> ClientError:
    return ClientError(f"the keys cannot be read: {error}", "api_keys_invalid")


def _checked(model: Any, **fields: Any) -> Any:
    from pydantic import ValidationError

    try:
        return model(**fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        text = str(problem["msg"]).removeprefix("Value error, ")
        raise UsageError(f"{'.'.join(map(str, problem['loc']))}: {text[:1].lower()}{text[1:]}") from None


def _expiry(text: str | None) -> datetime | None:
    if text is None:
        return None
    if found := re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text):
        return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=int(found[1]) * SECONDS[found[2]])
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is neither a time to go, as 90d, nor a date", param_hint="--expires") from None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


def _quota(adapters: int | None, size: str | None) -> "TenantQuota | None":
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from server.access.key import TenantQuota

    if adapters is None and size is None:
        return None
    try:
        return TenantQuota(adapters=adapters, bytes=TypeAdapter(ByteSize | None).validate_python(size))
    except ValidationError:
        raise UsageError(f"{size!r} is no number of bytes", param_hint="--max-bytes") from None


def _facts(key: "Key") -> dict[str, Any]:
    from server.access.key import utc_now

    facts = key.model_dump(mode="json", exclude={"sha256"})
    return facts | {"scopes": sorted(key.scopes), "state": key.state(utc_now())}


def _scopes(key: "Key") -> str:
    return ",".join(sorted(key.scopes))


def _row(key: "Key") -> tuple[str, ...]:
    from server.access.key import utc_now

    expires = f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "-"
    limits = [key.rate_limit] if key.rate_limit else []
    limits += [f"{key.token_limit} tokens"] if key.token_limit else []
    named = (key.id, key.state(utc_now()), key.tenant, _scopes(key), f"{key.created:%Y-%m-%d}")
    return (*named, expires, ", ".join(limits) or "-", key.note or "-")


def _bound(value: int | None) -> str:
    return "any number of" if value is None else str(value)

"""Checks of `polyrank doctor` of what a server talks to: Redis, the store's clock, and a server that runs."""

import os
import tempfile
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from server.client import Client, ClientError
from server.commands.checks import Check, State
from server.settings import Settings, flag, variable

SECONDS = 3.0  # until Redis, or a store's clock, is given up
SKEW_SECONDS = 5.0  # by the clocks, records and the grace of `gc` are told apart
REFUSED_SECONDS = 900.0  # S3 refuses requests that are signed with another time
OLDEST_REDIS = (6, 2)


def clock(settings: Settings) -> Check:
    """This machine's time against the store's."""
    place = settings.store.removeprefix("file://")
    if place.startswith("memory:"):
        return Check("clock", State.OK, "the store is in memory")
    theirs = _bucket_time(place) if "://" in place else _folder_time(Path(place))
    if theirs is None:
        return Check("clock", State.OK, "the store's is not known")
    skew = abs(time.time() - theirs)
    mend = "set the time by NTP (`timedatectl set-ntp true`)"
    if skew > REFUSED_SECONDS:
        return Check("clock", State.FAILED, f"{skew:.0f} s from the store's: it refuses signed requests", mend)
    if skew > SKEW_SECONDS:
        return Check("clock", State.WARNING, f"{skew:.0f} s from the store's", mend)
    return Check("clock", State.OK, "as the store's")


def _folder_time(place: Path) -> float | None:
    """Of the machine that keeps the folder, which may be another; None where nothing can be written."""
    nearest = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=nearest) as file:
            return os.stat(file.name).st_mtime
    except OSError:
        return None


def _bucket_time(place: str) -> float | None:
    """As the server of an S3 bucket says it in any answer."""
    import httpx

    if not place.startswith("s3://"):
        return None
    address = os.environ.get("AWS_ENDPOINT_URL") or "https://s3.amazonaws.com"
    try:
        return parsedate_to_datetime(httpx.head(address, timeout=SECONDS).headers["date"]).timestamp()
    except (httpx.HTTPError, httpx.InvalidURL, KeyError, ValueError):
        return None


def redis(settings: Settings) -> Check:
    """Whether Redis answers, is new enough, and lets us do all that servers do there."""
    if settings.redis is None:
        return Check("redis", State.OK, "none is asked for")
    from redis import Redis
    from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

    from server.replicas.keys import Keys

    where = f"the one of {variable('redis')}"
    client = Redis.from_url(settings.redis, socket_timeout=SECONDS, socket_connect_timeout=SECONDS)
    try:
        client.ping()
        number = str(client.info("server").get("redis_version", ""))
        _use(client, f"{Keys.of_store(settings.store).prefix}:doctor")
    except AuthenticationError:
        return Check("redis", State.FAILED, f"{where} refuses the user or the password", f"correct {variable('redis')}")
    except NoPermissionError as error:
        mend = "let its ACL allow +@all -@dangerous +info -@scripting on the keys polyrank:*"
        return Check("redis", State.FAILED, f"{where} does not permit: {error}", mend)
    except ResponseError as error:
        return Check("redis", State.FAILED, f"{where} knows no such command: {error}", "take Redis 6.2 or newer")
    except (RedisError, OSError) as error:
        mend = f"start it, or correct {variable('redis')}; servers answer without it, and share nothing but the store"
        return Check("redis", State.FAILED, f"{where} does not answer ({type(error).__name__})", mend)
    finally:
        client.close()
    if tuple(int(part) for part in number.split(".")[:2] if part.isdecimal()) < OLDEST_REDIS:
        return Check("redis", State.WARNING, f"Redis {number} is older than was tested", "take Redis 6.2 or newer")
    return Check("redis", State.OK, f"Redis {number} answers and permits all that is needed")


def _use(client: Any, key: str) -> None:
    """The commands that servers use, on a key of our own."""
    client.set(key, "1", px=5000)
    client.incr(key)
    client.expire(key, 5)
    client.mget([key])
    client.delete(key)
    client.zadd(key, {"x": 1})
    client.zrange(key, 0, -1)
    client.delete(key)
    client.sadd(key, "x")
    client.smembers(key)
    client.delete(key)
    client.xadd(key, {"x": "1"}, maxlen=10)
    client.xread({key: "0"}, count=1)
    client.delete(key)


def server(client: Client) -> Check:
    """Whether a server answers at POLYRANK_URL, takes the key, lives, takes work, and is of our version."""
    from importlib.metadata import version

    try:
        health, _ = client.probe("/health")
        ready, why = client.probe("/ready")
        info = client.info()
    except ClientError as error:
        state = State.FAILED if error.status in (401, 403) else State.WARNING
        return Check("server", state, error.message, error.hint or "")
    found = f"{client.url} serves {info.get('model_id') or info.get('model') or 'a model'}"
    if health >= 500:
        return Check(
            "server", State.FAILED, f"{found}, but its engine is stuck or dead", "restart it; its log says why"
        )
    if why == "store_unavailable":
        return Check("server", State.FAILED, f"{found}, but cannot read its store", f"see its {flag('store')}")
    if ready >= 500:
        mend = "it starts, ends (after a SIGTERM) or is slow; wait, and see its log"
        return Check("server", State.WARNING, f"{found}, but takes no work now", mend)
    theirs, ours = str(info.get("version", "")), version("polyrank")
    if theirs and theirs != ours:
        return Check("server", State.WARNING, f"{found} by version {theirs}, this is {ours}", "use the same version")
    return Check("server", State.OK, found)

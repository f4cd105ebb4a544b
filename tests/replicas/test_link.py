"""Every call ends in time, one failure spares the next calls, and a Redis that is back is found."""

import logging
import threading
import time

import pytest
from redis import Redis

from server.replicas.link import FAST_FAILURES, FAST_SECONDS, PAUSE_SECONDS, TIMEOUT_SECONDS, RedisAway, RedisLink
from server.replicas.state import LinkState
from tests.support.redis_server import RedisServer, Wire, until
from tests.support.server_process import free_port

SLACK = 2.0  # for a machine that does other things
RECOVERY = 5.0 + SLACK


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ping(redis: Redis) -> bool:
    return bool(redis.ping())


def answers(link: RedisLink) -> bool:
    try:
        return link.call(ping)
    except RedisAway:
        return False


def test_a_call_is_answered_and_counted(redis: RedisServer) -> None:
    link = RedisLink(redis.url)
    assert link.state() == LinkState(configured=True)
    with pytest.raises(RedisAway):
        link.fast(ping)  # not yet known to be there: a request does not find out
    assert link.call(ping)
    assert link.fast(ping)
    assert link.state() == LinkState(True, True, 2, 0, 0)
    link.close()


def test_after_a_failure_no_socket_is_touched_for_a_while() -> None:
    clock, tried = Clock(), []
    link = RedisLink(f"redis://127.0.0.1:{free_port()}", clock)

    def attempt(redis: Redis) -> bool:
        tried.append(1)
        return ping(redis)

    for _ in range(3):
        with pytest.raises(RedisAway):
            link.call(attempt)
        with pytest.raises(RedisAway):
            link.fast(attempt)
    assert len(tried) == 1
    assert link.state() == LinkState(True, False, 1, 1, 1)
    clock.now += PAUSE_SECONDS
    with pytest.raises(RedisAway):
        link.fast(attempt)
    assert len(tried) == 1, "requests do not probe"
    with pytest.raises(RedisAway):
        link.call(attempt)
    assert len(tried) == 2


def test_one_caller_probes_while_the_others_are_spared(redis: RedisServer) -> None:
    link = RedisLink(redis.url)
    probing, go = threading.Event(), threading.Event()

    def slow(client: Redis) -> bool:
        probing.set()
        assert go.wait(30)
        return ping(client)

    prober = threading.Thread(target=link.call, args=(slow,))
    prober.start()
    assert probing.wait(30)
    with pytest.raises(RedisAway):
        link.call(ping)
    go.set()
    prober.join(30)
    assert link.call(ping)


def test_requests_forgive_a_late_answer_or_two(redis: RedisServer) -> None:
    with Wire(redis.port) as wire:
        link = RedisLink(wire.url)
        assert link.call(ping)
        assert link.fast(ping)
        wire.delay = 4 * FAST_SECONDS
        for number in range(FAST_FAILURES):
            assert link.up, number
            with pytest.raises(RedisAway):
                link.fast(ping)
        assert not link.up
        link.close()


@pytest.mark.parametrize("fault", ["frozen", "slow", "garbage", "killed"])
def test_every_fault_costs_at_most_a_time_out_and_ends(redis: RedisServer, fault: str) -> None:
    with Wire(redis.port) as wire:
        link = RedisLink(wire.url)
        assert answers(link)
        if fault == "frozen":
            redis.freeze()
        elif fault == "slow":
            wire.delay = 2.0
        elif fault == "garbage":
            wire.garbage = b"\x00\xff:what is this?\r\n$-7\r\n"
        else:
            redis.kill()
        started = time.monotonic()
        assert not answers(link)
        assert time.monotonic() - started < TIMEOUT_SECONDS + SLACK
        assert not link.state().up
        if fault == "frozen":
            redis.thaw()
        elif fault == "killed":
            redis.start()
        wire.delay, wire.garbage = 0.0, None
        until(lambda: answers(link), RECOVERY, f"the link comes back after {fault}")
        assert link.up
        link.close()


def test_no_password_in_the_log(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    with redis.client() as admin:
        admin.config_set("requirepass", "right")
    link = RedisLink(f"redis://:very-secret@127.0.0.1:{redis.port}")
    with caplog.at_level(logging.INFO):
        assert not answers(link)
    (record,) = caplog.records
    assert record.message == "redis_away"
    assert "password" in record.reason  # type: ignore[attr-defined]
    assert "secret" not in str(record.__dict__)


def test_a_fault_that_lasts_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    link = RedisLink(f"redis://127.0.0.1:{free_port()}", clock)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            assert not answers(link)
            clock.now += PAUSE_SECONDS
    assert [record.message for record in caplog.records] == ["redis_away"]
    assert link.state().openings == 5


def test_an_answer_that_makes_no_sense_to_the_work_is_a_failure(redis: RedisServer) -> None:
    link = RedisLink(redis.url)
    assert link.call(ping)
    with pytest.raises(RedisAway):
        link.call(lambda client: int(client.echo("no number")))
    assert not link.up
    link.close()

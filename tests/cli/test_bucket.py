"""A bucket as the store, seen from the command line: what is wrong with it is said in one line."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from adapters_store.log import open_store
from adapters_store.places import open_objects
from server.commands import checks
from server.commands.checks import State
from server.settings import load
from tests.adapters_store.s3 import S3, serving
from tests.cli.conftest import Polyrank
from tests.cli.test_doctor import free_port
from tests.cli.test_store import filled
from tests.contract.sources import ROOT


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serving() as server:
        yield server


def test_a_server_does_not_start_on_a_bucket_that_is_missing(s3: S3) -> None:
    command = [sys.executable, "-m", "server", "serve", "--store", "s3://nowhere/p", "--port", str(free_port())]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "error: The adapter store `s3://nowhere/p` has no such bucket: create it, or name another with --store. "
        "(store_not_found)"
    )


def test_doctor_tries_the_bucket_out(s3: S3) -> None:
    assert checks.store(load({"store": s3.url()})).state is State.OK
    with s3.refusing():
        finding = checks.store(load({"store": s3.url()}))
    assert finding.state is State.FAILED
    assert "AWS_ACCESS_KEY_ID" in finding.found


def test_upkeep_of_a_bucket(polyrank: Polyrank, s3: S3) -> None:
    url = s3.url()
    filled(open_store(url))
    assert polyrank("fsck", "--store", url).code == 0
    assert polyrank("gc", "--store", url, "--delete").out == "0 files (0 B) removed\n"
    for command in ("fsck", "gc"):
        mistyped = polyrank(command, "--store", f"{url}x")
        assert (mistyped.code, mistyped.out) == (1, "")
        assert f"there is nothing at {url}x" in mistyped.err
    assert not open_objects(f"{url}x").listing(""), "upkeep left something where there is no store"
    missing = polyrank("fsck", "--store", "s3://nowhere/p")
    assert missing.code == 1
    assert missing.err.endswith("(store_not_found)\n")

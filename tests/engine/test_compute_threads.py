"""While the engine runs, the CPU's threads are its own; what loads the model leaves none behind."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch
from server.engine.compute_threads import ComputeThreads, in_passing


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    dispatch.load()  # as every engine has it before its thread starts
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def counts() -> list[int]:
    """Threads that torch, and our kernels, take on the calling thread, after both have run a parallel loop."""
    torch.randn(1 << 18).exp_()
    found = [torch.get_num_threads()]
    if dispatch.load() == "cpu":
        weight = torch.randint(-9, 9, (512, 512), dtype=torch.int8)
        dispatch.int8_linear(torch.randn(40, 512), dispatch.int8_pack(weight), torch.ones(512))
        found.append(torch.ops.polyrank.threads())
    return found


def test_the_engine_keeps_its_threads_whatever_others_are_left() -> None:
    threads = in_passing(ComputeThreads)
    confined, seen = threading.Event(), []

    def engine() -> None:
        threads.take()
        assert confined.wait(60)
        seen.append(counts())

    running = threading.Thread(target=engine)
    running.start()
    threads.confine_others()
    confined.set()
    running.join()
    assert set(seen[0]) == {2}
    assert set(in_passing(counts)) == {1}
    assert torch.get_num_threads() == 1
    threads.release()
    assert set(in_passing(counts)) == {2}


WATCHED = """
import os, time
import torch
from server.engine.compute_threads import in_passing

def tasks():
    return len(os.listdir("/proc/self/task"))

def work():
    torch.randn(1 << 20).exp_()
    return tasks()

torch.set_num_threads(4)
before = tasks()
during = in_passing(work)
deadline = time.monotonic() + 60
while tasks() > before and time.monotonic() < deadline:
    time.sleep(0.01)  # nothing to wait on: the runtime ends its workers after the thread
print(during - before, tasks() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_nothing_is_left_of_work_in_passing() -> None:
    """In a process of its own: here, threads of other tests come and go."""
    told = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=True, timeout=300)
    during, after = map(int, told.stdout.split())
    assert during >= 4, "the thread itself and three workers"
    assert after == 0


def test_work_in_passing_gives_its_result_or_its_error() -> None:
    assert in_passing(lambda: threading.current_thread().name) == "loading"

    def fail() -> None:
        raise LookupError("not there")

    with pytest.raises(LookupError, match="not there"):
        in_passing(fail)

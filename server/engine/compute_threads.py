"""Threads of the CPU kernels: while the engine runs they are the engine's alone.

OpenMP keeps workers for every thread that ever ran a parallel loop. Once there are more of them than cores, GNU's
runtime no longer lets a worker spin for a moment between two loops but has it sleep, and waking it costs more than most
loops take: with the workers of the thread that had loaded the model still there, a step of one row took 37 ms instead
of 17, one of eight 42 instead of 24 (int8, eager, 2-core AVX-512 VM, 2026-11-25). No environment variable mends it.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from kernels import dispatch

T = TypeVar("T")


class ComputeThreads:
    """The engine thread takes all threads; every other thread computes alone until they are released."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._taken = threading.Event()

    def take(self) -> None:
        """On the engine thread, before it computes."""
        try:
            dispatch.keep_threads(self.count)
        finally:
            self._taken.set()

    def confine_others(self) -> None:
        """On the thread that started the engine: wait for `take`, then leave one thread to each of the others."""
        self._taken.wait()
        torch.set_num_threads(1)

    def release(self) -> None:
        """The engine has ended."""
        torch.set_num_threads(self.count)


def in_passing(work: Callable[[], T]) -> T:
    """Compute on a thread that ends with the work, and its workers with it; raises what the work raises."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="loading", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # Python's signal handlers run when this thread wakes, and the system may wake another
    return result.result()

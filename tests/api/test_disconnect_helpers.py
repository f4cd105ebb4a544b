"""Cleaning up while being cancelled."""

import asyncio

import anyio
import pytest

from server.api.disconnect import to_the_end


async def test_work_ends_although_the_caller_is_cancelled_again_and_again() -> None:
    steps = 0

    async def work() -> None:
        nonlocal steps
        for _ in range(50):
            await asyncio.sleep(0)
            steps += 1

    task = asyncio.create_task(to_the_end(work()))
    for _ in range(10):
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == 50


async def test_work_ends_inside_a_cancelled_scope_of_anyio() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        await asyncio.sleep(0.01)
        ended = True

    with anyio.CancelScope() as scope:
        scope.cancel()
        await to_the_end(work())
    assert ended


async def test_results_and_errors_pass() -> None:
    async def fine() -> int:
        return 3

    async def broken() -> None:
        raise ValueError("broken")

    assert await to_the_end(fine()) == 3
    with pytest.raises(ValueError, match="broken"):
        await to_the_end(broken())

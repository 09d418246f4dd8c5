"""Calls in threads, which nothing can break off: who is cancelled waits until they are over."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


async def to_its_end(call: Callable[..., R], *arguments: Any) -> R:
    """One call in a thread. Cancelled, it ends only after the call has, so that nothing is written behind its back."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await ended(work)
        raise


async def ended(work: "asyncio.Future[Any]") -> None:
    """Wait until work is over, whoever is cancelled meanwhile; its result is dropped."""
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            continue  # the thread is still running
    if not work.cancelled():
        work.exception()  # looked at, or asyncio would complain that nobody did

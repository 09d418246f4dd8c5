"""Outbox: callers' webhooks are told what happens to their jobs; the end of a job until it is told or given up.

How far that has come stands in the job, so that it goes on where a replica was lost. An event on the way is told at
most once: the next one says more.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from deployments import replicate_view
from deployments.job_view import end_view
from deployments.lease import insist
from pipeline.errors import ImageNotFound
from pipeline.job_store import Held, JobStore
from pipeline.jobs import Hook, Job

DELIVERIES = 16  # of ends, and as many of events on the way, at once in one replica; of the latter no more are made
SHARE = 4  # of the ends, to one receiver


class Sender(Protocol):
    """One try of one delivery. See pipeline.webhooks.Webhooks."""

    attempts: int

    def deliver(self, url: str, delivery_id: str, body: bytes, tenant: str) -> bool | None:
        """Whether it arrived; None where there is no use in trying again."""

    def retry_delay(self, delivery_id: str, tries: int) -> float:
        """Seconds until the next try."""


class Outbox:
    """What is to be told, and the telling. See deployments.worker.Outbox."""

    def __init__(self, jobs: JobStore, sender: Sender) -> None:
        self._jobs, self._sender = jobs, sender
        self._passing: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(2 * DELIVERIES, "webhooks")
        self._places = asyncio.Semaphore(DELIVERIES)
        self._shares: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by receiver

    def passing(self, job: Job, name: str, data: Mapping[str, Any]) -> None:
        """An event on the way, told at most once and without waiting for it."""
        if job.hook is None or name not in job.hook.events or len(self._passing) >= DELIVERIES:
            return
        moment = f"{job.id}-{name}-{time.time_ns()}"
        body = _body(job, name, {"id": job.id, "status": "queued" if name == "queued" else "running", **data})
        task = asyncio.ensure_future(self._deliver(job.hook.url, moment, body, job.tenant))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def end(self, held: Held) -> Held:
        """The end of a job; returns the job as it was last written. Raises StoreConflict where it has changed."""
        while (hook := held.job.hook) is not None and not hook.over:
            if held.job.state not in hook.events:
                return held
            await asyncio.sleep(max(0.0, hook.due - time.time()))
            async with self._place(hook.url):
                held, arrived = await self._try(held, hook)
            if arrived is not False or hook.tries + 1 >= self._sender.attempts:
                held = await insist(self._changed, held, {"over": True})
        return held

    async def _try(self, held: Held, hook: Hook) -> tuple[Held, bool | None]:
        """Tell the end once; the job as it is then written, and what came of it, as Sender.deliver has it."""
        delivery, tries = f"{held.job.id}-{held.job.state}", hook.tries + 1
        # Written before it is tried: where two replicas are at it, one of them is refused here.
        due = time.time() + self._sender.retry_delay(delivery, tries)
        held = await insist(self._changed, held, {"tries": tries, "due": due})
        try:
            view = await insist(end_view, self._jobs, held.job)
        except ImageNotFound:  # erased
            return held, None
        body = _body(held.job, held.job.state, view)
        return held, await self._deliver(hook.url, delivery, body, held.job.tenant)

    @asynccontextmanager
    async def _place(self, url: str) -> AsyncIterator[None]:
        """One of the places for deliveries, of which no receiver that hangs has more than its share."""
        share = self._shares.setdefault(urlsplit(url).netloc, asyncio.Semaphore(SHARE))
        async with share, self._places:
            yield

    async def _deliver(self, url: str, delivery_id: str, body: bytes, tenant: str) -> bool | None:
        """One try, in a thread of the outbox's own: receivers that hang keep nobody from the store."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._sender.deliver, url, delivery_id, body, tenant)

    def _changed(self, held: Held, changes: dict[str, Any]) -> Held:
        return self._jobs.tell(held, **changes)


def _body(job: Job, name: str, data: Mapping[str, Any]) -> bytes:
    told = {"type": name, "data": data} if job.origin is None else replicate_view.webhook(job, data)
    return json.dumps(told, ensure_ascii=False).encode()

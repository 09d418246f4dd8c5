"""Jobs: what callers can do with work that goes on without them. Any ingress replica can serve any job."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from deployments.glance import Glance
from deployments.job_view import end_view, final_view, open_view
from deployments.lease import AWAY
from deployments.reporter import BoardClient
from deployments.runner import Runner
from deployments.service import lasting
from deployments.threads import ended, to_its_end
from deployments.worker import Outbox
from pipeline.errors import Overloaded
from pipeline.job_store import JobStore
from pipeline.jobs import ENDS, Job
from pipeline.progress import BEGINNING, LAST, Position, ServerEvent
from pipeline.request import Request
from pipeline.settings import JobSettings

IDLE_SECONDS = 4.0  # without an event, after which the store is asked
Check = Callable[[Request, str], Awaitable[None]]


class Jobs:
    """The jobs of all tenants, as one ingress replica serves them."""

    def __init__(
        self, store: JobStore, runner: Runner, board: BoardClient, outbox: Outbox, settings: JobSettings, check: Check
    ) -> None:
        """`check(request, tenant)` raises BadInput for what could only fail later, when nobody waits any more."""
        self._store, self._runner, self._board, self._outbox = store, runner, board, outbox
        self._check = check
        self._settings = settings
        self._glance = Glance(board)
        self._telling: set[asyncio.Future[Any]] = set()

    def open_jobs(self, tenant: str) -> int:
        """A tenant's jobs that are queued or running, at this replica's last look."""
        return self._runner.open_jobs(tenant)

    async def submit(
        self,
        request: Request,
        tenant: str,
        idempotency_key: str | None,
        origin: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Any], bool]:
        """Accept a request; returns its job, and whether its Idempotency-Key had been used for it before.

        Raises Overloaded, IdempotencyConflict, StoreError; else the job is in the store and cannot be lost. A caller
        who leaves meanwhile leaves no job behind, unless it is a lasting one.
        """
        if self._runner.open_jobs() >= self._settings.max_open:
            raise Overloaded("There are as many jobs as the service keeps; try again after the time in Retry-After.")
        await self._check(request, tenant)
        work = asyncio.to_thread(self._store.submit, request, tenant, idempotency_key, origin)
        submitting = asyncio.ensure_future(work)
        try:
            job_id, job = await asyncio.shield(submitting)
            if job is None:
                return await self.view(tenant, job_id), True
            # Nothing is read any more: were the store away now, an accepted job would be answered with an error.
            return self._accepted(job), False
        except asyncio.CancelledError:
            await ended(submitting)
            if submitting.exception() is None and not lasting(request, idempotency_key):
                await self.cancel(tenant, submitting.result()[0])
            raise

    async def view(self, tenant: str, job_id: str) -> dict[str, Any]:
        """A job, open or ended; raises ImageNotFound."""
        held = await asyncio.to_thread(self._store.read, tenant, job_id)
        if held is None:
            return final_view(await asyncio.to_thread(self._store.record, tenant, job_id))
        if held.job.over:
            return await asyncio.to_thread(end_view, self._store, held.job)
        view = open_view(held.job, self._runner.position(job_id))
        if held.job.state == "queued" and view["position"] is None:  # newer than the last look
            view["position"] = self._runner.queued
        return {**view, "progress": await self._progress(held.job) or view["progress"]}

    async def wait(self, tenant: str, job_id: str, seconds: float) -> dict[str, Any]:
        """A job when it has ended, or as it is after so many seconds; raises ImageNotFound, StoreError."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for _ in self.follow(tenant, job_id, BEGINNING):
                    pass
        return await self.view(tenant, job_id)

    async def follow(self, tenant: str, job_id: str, after: Position) -> AsyncIterator[ServerEvent | None]:
        """The events of a job beyond a position, up to its end; None where there is nothing to tell for a while.

        Raises ImageNotFound; at the latest when the first event is asked for.
        """
        view = await self.view(tenant, job_id)
        while True:
            events = await self._after(job_id, after, 0.0 if view["status"] in ENDS else IDLE_SECONDS)
            for event in events:
                yield event
                after = max(after, event.at)
                if event.ends:
                    return
            if events:
                continue
            with suppress(*AWAY):  # it says later what has become of the job
                view = await self.view(tenant, job_id)
            if view["status"] in ENDS:  # and the board does not know it any more
                yield ServerEvent(Position(view["attempt"], LAST), view["status"], view)
                return
            yield None

    async def cancel(self, tenant: str, job_id: str) -> dict[str, Any]:
        """Stop a job; what has ended stays as it is. Raises ImageNotFound."""
        held = await to_its_end(self._store.stop, tenant, job_id, "cancelled")
        if held is not None and held.job.state == "cancelled":
            self._runner.stop(job_id)
            self._tell(self._board.notify("stopped", job_id))
            self._runner.settle(held, self._announce)
        return await self.view(tenant, job_id)

    async def erase(self, tenant: str, job_id: str) -> None:
        """Remove a job with its photos, pictures and record, stopping it first; raises ImageNotFound."""
        await to_its_end(self._store.erase, tenant, job_id)
        self._runner.stop(job_id)
        self._tell(self._board.notify("stopped", job_id))
        self._tell(self._board.end(job_id, "cancelled", {"id": job_id, "status": "cancelled"}))

    def _accepted(self, job: Job) -> dict[str, Any]:
        self._runner.accepted(job)
        data = {"position": self._runner.queued}
        self._outbox.passing(job, "queued", data)
        self._tell(self._board.publish(job.id, 0, 0, [ServerEvent(Position(0, 0), "queued", data)]))
        self._tell(self._board.notify("queued", job.id))
        return open_view(job, self._runner.queued)

    async def _announce(self, job: Job) -> None:
        with suppress(Exception):  # whatever keeps the board away: watchers find the end in the store
            await self._board.end(job.id, job.state, open_view(job, None))

    async def _progress(self, job: Job) -> dict[str, int] | None:
        """How far a running job is, where this replica runs it, or the board knows it."""
        if job.state != "running":
            return None
        found = self._runner.progress(job.id) or await self._glance.progress(job)
        return None if found is None else {"step": found[0], "steps": found[1]}

    async def _after(self, job_id: str, after: Position, seconds: float) -> list[ServerEvent]:
        try:
            return await self._board.after(job_id, after, seconds)
        except Exception:  # whatever keeps the board away: the store is asked more often instead
            await asyncio.sleep(min(seconds, 1.0))
            return []

    def _tell(self, message: Any) -> None:
        """Tell the board without waiting for it."""

        async def telling() -> None:
            with suppress(Exception):  # nothing depends on it
                await message

        task = asyncio.ensure_future(telling())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

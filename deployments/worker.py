"""Worker: one job from its claim to its settled end. Whoever loses the lease on the way leaves nothing behind."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence, Set
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from deployments.job_view import end_view
from deployments.lease import Lease, LeaseLost, insist
from deployments.problems import problem, unforeseen
from deployments.reporter import BoardClient, Reporter
from deployments.threads import ended
from pipeline.errors import (
    Busy,
    DeadlineExceeded,
    Overloaded,
    PipelineError,
    StoreConflict,
    StoreError,
    WorkerUnavailable,
)
from pipeline.events import Event
from pipeline.job_store import Held, JobStore
from pipeline.jobs import Job
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.settings import JobSettings
from pipeline.store import ImageStore

log = logging.getLogger(__name__)
BEATS = 5  # heartbeats in a lease
PAUSE = 0.5  # seconds before work that found no room, or lost its worker, is tried again
Progress = Callable[[int, Event], None]
Announce = Callable[[Job], Awaitable[None]]  # the end of a job, to those who watch it


class Make(Protocol):
    """Who makes the pictures of a request; raises PipelineError."""

    def __call__(
        self, request: Request, tenant: str, expires: float, progress: Progress
    ) -> Awaitable[Sequence[Picture]]:
        """`expires`: seconds since 1970; `progress(number, event)` hears what happens to picture `number`."""


class Outbox(Protocol):
    """Who tells callers' webhooks what happens to their jobs."""

    def passing(self, job: Job, name: str, data: Any) -> None:
        """An event on the way, which is told at most once."""

    async def end(self, held: Held) -> Held:
        """The end of a job, until it is told or given up; the job as it was last written. Raises StoreConflict."""


class Worker:
    """Runs jobs; of each it keeps how far it is, and what is still to be told of its end."""

    def __init__(
        self, jobs: JobStore, images: ImageStore, make: Make, board: BoardClient, outbox: Outbox, settings: JobSettings
    ) -> None:
        self._jobs, self._images, self._make = jobs, images, make
        self._board, self._outbox, self._settings = board, outbox, settings
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._reporters: dict[str, Reporter] = {}  # of the jobs that run here

    async def run(self, held: Held, owner: str) -> bool:
        """Claim a job and bring it to its end; False where it could not be claimed.

        Cancelled, it gives the job back if it still has it.
        """
        lease = await self._claimed(held, owner)
        if lease is None:
            return False
        held = lease.held
        reporter = self._reporters[held.job.id] = Reporter(self._board, held.job.id, held.job.attempt)
        try:
            await self._hold(lease, reporter)
        except LeaseLost:
            log.info("job %s is no longer ours", held.job.id)
        except asyncio.CancelledError:
            await _given_back(lease)
            raise
        finally:
            del self._reporters[held.job.id]
            await reporter.close()
            if not lease.job.over:
                with suppress(StoreError):  # else whoever settles the job removes what is left
                    await asyncio.to_thread(self._images.discard, held.job.id, held.job.attempt)
        return True

    def progress(self, job_id: str) -> tuple[int, int] | None:
        """Steps done and in all of a job that runs here."""
        reporter = self._reporters.get(job_id)
        return None if reporter is None else reporter.progress

    @property
    def telling(self) -> Set[str]:
        """Jobs whose end is being told here; settled they are."""
        return self._telling.keys()

    async def finish(self, held: Held, announce: Announce | None = None) -> bool:
        """Settle the end of a job, and tell it; without `announce`, of one that nobody was at for a whole lease.

        False where it has changed since it was read: then somebody is at it.
        """
        if announce is None:
            fresh = await asyncio.to_thread(self._jobs.read, held.job.tenant, held.job.id)
            if fresh != held:
                return False
        await self._settle(held, announce)
        await self._tell(held, alone=announce is None)
        return True

    async def close(self) -> None:
        """Leave what is still to be told to whoever finds it."""
        await stopped(*self._telling.values())

    async def _claimed(self, held: Held, owner: str) -> Lease | None:
        """The lease of a job; None where it could not be claimed. Cancelled, it gives back what it got."""
        claiming = asyncio.ensure_future(asyncio.to_thread(self._jobs.claim, held, owner))
        try:
            return Lease(self._jobs, await asyncio.shield(claiming))
        except StoreConflict:  # somebody else was quicker
            return None
        except StoreError as error:
            log.warning("job %s cannot be claimed: %s", held.job.id, error.code)
            return None
        except asyncio.CancelledError:
            await ended(claiming)
            if claiming.exception() is None:
                await _given_back(Lease(self._jobs, claiming.result()))
            raise

    async def _settle(self, held: Held, announce: Announce | None) -> None:
        await insist(self._jobs.settle, held.job)
        if announce is not None:
            await announce(held.job)

    async def _tell(self, held: Held, alone: bool) -> None:
        with suppress(StoreConflict):  # erased meanwhile
            held = await self._outbox.end(held)
            if alone or not held.job.haunted:
                await insist(self._jobs.forget, held)

    async def _hold(self, lease: Lease, reporter: Reporter) -> None:
        """Bring a claimed job to its end while its heartbeats go out, and settle it; raises LeaseLost."""
        beats = asyncio.ensure_future(lease.keep(self._settings.lease_seconds / BEATS, lambda: reporter.progress))
        making = asyncio.ensure_future(self._end(lease, reporter))
        try:
            await asyncio.wait((beats, making), return_when=asyncio.FIRST_COMPLETED)
            await (making if making.done() else beats)  # the heartbeats end by raising LeaseLost alone
        finally:
            await stopped(making, beats)
        await self._settle(lease.held, partial(self._announce, reporter))
        # Beside the next job: a webhook that does not answer is told again for hours.
        telling = asyncio.ensure_future(self._tell(lease.held, alone=False))
        self._telling[lease.job.id] = telling
        telling.add_done_callback(lambda _: self._telling.pop(lease.job.id, None))

    async def _announce(self, reporter: Reporter, job: Job) -> None:
        reporter.end(job.state, await insist(end_view, self._jobs, job))

    async def _end(self, lease: Lease, reporter: Reporter) -> None:
        """Write the end of the job, whatever it is; raises LeaseLost."""
        try:
            await self._carry_out(lease, reporter)
        except LeaseLost:
            raise
        except Exception as error:  # also what nobody foresaw, or each replica in turn would try it
            known = error if isinstance(error, PipelineError) else unforeseen(error, "a job")
            await lease.insist(state="failed", problem=problem(known))

    async def _carry_out(self, lease: Lease, reporter: Reporter) -> None:
        """Make the pictures: publish, then commit; raises LeaseLost, PipelineError."""
        job = lease.job
        published = await insist(self._jobs.published, job)
        if published is not None:  # its pictures were complete when its owner was lost
            await lease.insist(state="succeeded", attempt=published)
            return
        if job.lost >= self._settings.attempts:
            raise WorkerUnavailable("The workers of this job were lost again and again; send its request again.")
        request = await insist(self._jobs.request, job)
        if request is None:
            raise LeaseLost  # it had ended before it was claimed
        try:
            async with asyncio.timeout(job.deadline - time.time()) as clock:
                pictures = await self._made(request, job, reporter)
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise DeadlineExceeded("The job had not ended by its deadline; give it more time.") from error
        await insist(self._images.publish, job.id, request, pictures, job.tenant, job.attempt)
        await lease.insist(state="succeeded", progress=reporter.progress)

    async def _made(self, request: Request, job: Job, reporter: Reporter) -> Sequence[Picture]:
        """The pictures of a request, tried again where that can help; raises PipelineError."""

        def hear(number: int, event: Event) -> None:
            for name, data in reporter.hear(number, event):
                self._outbox.passing(job, name, data)

        self._outbox.passing(job, "started", {"attempt": job.attempt})
        lost = 0
        while True:
            reporter.begin(request.num_outputs)
            try:
                return await self._make(request, job.tenant, job.deadline, hear)
            except DeadlineExceeded:  # later there is even less time
                raise
            except (Busy, StoreError) as error:
                lost += not isinstance(error, Overloaded)  # for room it waits for as long as it may
                if lost >= self._settings.attempts:
                    raise
                log.info("job %s is tried again: %s", job.id, error.code)
            await asyncio.sleep(PAUSE)


async def _given_back(lease: Lease) -> None:
    """Let another begin a job at once; where its caller has stopped it this write is refused."""
    with suppress(LeaseLost, StoreError):
        await lease.change(state="queued", owner="", progress=None)


async def stopped(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait until they are over, so that none of them writes any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

"""Lease: the right to change one job, held by one owner and lost at the first write that is refused."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from deployments.threads import ended, to_its_end
from pipeline.errors import StoreConflict, StoreCorrupt, StoreError, StoreMisconfigured, StoreUnavailable
from pipeline.job_store import Held, JobStore
from pipeline.jobs import Job

R = TypeVar("R")
log = logging.getLogger(__name__)
AWAY = (StoreUnavailable, StoreMisconfigured)  # what passes, or is put right while the service runs
DAMAGES = 3  # times that bytes may have come to harm on their way; then it is not the way
PAUSES = (0.2, 0.5, 1.0, 2.0)  # seconds between tries while the store is away; the last one repeats


class LeaseLost(Exception):
    """Somebody else has changed the job: cancelled, erased or taken it over."""


class Lease:
    """A claimed job; its writes follow each other, each over the version before."""

    def __init__(self, jobs: JobStore, held: Held) -> None:
        self._jobs = jobs
        self.held = held
        self._turn = asyncio.Lock()

    @property
    def job(self) -> Job:
        """The job as it was last written."""
        return self.held.job

    async def change(self, **changes: Any) -> None:
        """Write the job's next version; raises LeaseLost, StoreError."""
        work = asyncio.ensure_future(self._change(changes))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await ended(work)  # or nobody would know which version is in the store
            raise

    async def insist(self, **changes: Any) -> None:
        """The same until the store answers; raises LeaseLost, StoreCorrupt."""
        await _until_it_answers(lambda: self.change(**changes))

    async def keep(self, seconds: float, progress: Callable[[], tuple[int, int] | None]) -> None:
        """Heartbeats, `seconds` apart, for as long as the job is ours; raises LeaseLost."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.change(progress=progress())
            except StoreError as error:  # nobody can take the job over either
                log.warning("no heartbeat of job %s: %s", self.job.id, error.code)

    async def _change(self, changes: dict[str, Any]) -> None:
        async with self._turn:
            if self.job.over:  # a heartbeat that came too late
                return
            try:
                self.held = await asyncio.to_thread(self._change_held, changes)
            except StoreConflict as error:
                raise LeaseLost from error

    def _change_held(self, changes: dict[str, Any]) -> Held:
        try:
            return self._jobs.change(self.held, **changes)
        except StoreConflict:
            found = self._jobs.read(self.job.tenant, self.job.id)
            if found is None or not _follows(found.job, self.job):
                raise
            return found if found.job.over else self._jobs.change(found, **changes)


def _follows(found: Job, known: Job) -> bool:
    """Whether a version is the owner's own next one: a write that arrived though its answer was lost."""
    return (found.owner, found.attempt, found.beat) == (known.owner, known.attempt, known.beat + 1)


async def insist(call: Callable[..., R], *arguments: Any) -> R:
    """One call of the store, until it answers; raises what waiting does not mend: StoreConflict, StoreCorrupt."""
    return await _until_it_answers(lambda: to_its_end(call, *arguments))


async def _until_it_answers(call: Callable[[], Awaitable[R]]) -> R:
    damages = 0
    for pause in itertools.chain(PAUSES, itertools.repeat(PAUSES[-1])):
        try:
            return await call()
        except (*AWAY, StoreCorrupt) as error:
            damages += isinstance(error, StoreCorrupt)
            if damages > DAMAGES:
                raise
            log.warning("the store: %s; trying again", error.code)
        await asyncio.sleep(pause)
    raise AssertionError("the pauses have no end")

"""Lease: the right to change one job, held by one owner and lost at the first write that is refused."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from deployments.threads import ended, to_its_end
from pipeline.errors import StoreConflict, StoreMisconfigured, StoreUnavailable
from pipeline.job_store import Held, JobStore
from pipeline.jobs import Job

R = TypeVar("R")
log = logging.getLogger(__name__)
AWAY = (StoreUnavailable, StoreMisconfigured)  # what passes, or is put right while the service runs
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
        for pause in _pauses():
            try:
                await self.change(**changes)
            except AWAY as error:
                log.warning("job %s cannot be written (%s); trying again", self.job.id, error.code)
                await asyncio.sleep(pause)
            else:
                return

    async def keep(self, seconds: float, progress: Callable[[], tuple[int, int] | None]) -> None:
        """Heartbeats, `seconds` apart, for as long as the job is ours; raises LeaseLost."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.change(progress=progress())
            except AWAY as error:  # nobody can take the job over either
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
        return self._jobs.change(self.held, **changes)


async def insist(call: Callable[..., R], *arguments: Any) -> R:
    """One call of the store, until it answers; raises what waiting does not mend: StoreConflict, StoreCorrupt."""
    for pause in _pauses():
        try:
            return await to_its_end(call, *arguments)
        except AWAY as error:
            log.warning("the store is away (%s); trying again", error.code)
            await asyncio.sleep(pause)
    raise AssertionError("the pauses have no end")


def _pauses() -> Iterator[float]:
    yield from PAUSES
    while True:
        yield PAUSES[-1]

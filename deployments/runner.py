"""Runner: an ingress replica's look at the jobs. What nobody runs it gives to its worker, within its bounds.

Every replica sees the same listing of open jobs. A job whose record has not changed for `lease_seconds` of this
replica's own clock has lost its owner: clocks of different machines are never compared.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deployments.problems import unforeseen
from deployments.reporter import BoardClient
from deployments.worker import Announce, Worker, stopped
from pipeline.errors import StoreCorrupt, StoreError
from pipeline.job_store import Held, JobStore, Listed
from pipeline.jobs import Job, in_turn
from pipeline.settings import JobSettings

log = logging.getLogger(__name__)
READERS = 16  # jobs read at once
NOTICE_SECONDS = 10.0
PAUSE = 1.0  # seconds before a board that does not answer is asked again


@dataclass(slots=True)
class _Seen:
    """A job as it was last read, and when it was first seen so, by this machine's own clock."""

    held: Held
    since: float


class Runner:
    """The jobs of one ingress replica."""

    def __init__(self, jobs: JobStore, worker: Worker, board: BoardClient, settings: JobSettings) -> None:
        self._jobs, self._worker, self._board, self._settings = jobs, worker, board, settings
        self._seen: dict[str, _Seen] = {}
        self._damaged: dict[str, tuple[str, float]] = {}  # versions that cannot be read, and until when not to try
        self._queue: dict[str, int] = {}  # the place of each queued job
        self._open = Counter[str]()  # open jobs that are not over, by tenant
        self._accepted: dict[str, tuple[str, float]] = {}  # tenants of jobs newer than the last look, and since when
        self._resting: dict[str, float] = {}  # until when not to try again what could not be begun or settled
        self._tasks: dict[str, asyncio.Task[bool]] = {}
        self._ending: dict[str, asyncio.Task[bool]] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()

    def start(self, owner: str) -> None:
        """Begin to look for jobs, as this owner; once."""
        if not self._loops:
            self._loops = [asyncio.ensure_future(self._look(owner)), asyncio.ensure_future(self._listen())]

    async def close(self) -> None:
        """Give back what is running, so that others go on with it at once."""
        await stopped(*self._loops)
        await stopped(*self._tasks.values(), *self._ending.values())
        await self._worker.close()

    def open_jobs(self, tenant: str | None = None) -> int:
        """Jobs that are queued or running, a tenant's or everybody's: at the last look, and accepted here since."""
        accepted = sum(tenant in (None, whose) for whose, _ in self._accepted.values())
        return accepted + (self._open.total() if tenant is None else self._open[tenant])

    def accepted(self, job: Job) -> None:
        """A job that was just submitted here: it counts at once, and is looked for."""
        self._accepted[job.id] = job.tenant, time.monotonic()
        self._wake.set()

    @property
    def queued(self) -> int:
        """Jobs in the queue at the last look."""
        return len(self._queue)

    def position(self, job_id: str) -> int | None:
        """How many queued jobs go before one; None where it is not known to be queued."""
        return self._queue.get(job_id)

    def progress(self, job_id: str) -> tuple[int, int] | None:
        """Steps done and in all of a job that runs here; None where it does not."""
        return self._worker.progress(job_id)

    def stop(self, job_id: str) -> None:
        """Stop a job at once whose record says that it is over, if it runs here."""
        if job_id in self._tasks:
            self._tasks[job_id].cancel()

    def settle(self, held: Held, announce: Announce) -> None:
        """Settle the end of a job that its caller has stopped."""
        if held.job.id not in self._ending:
            self._begin(self._ending, held.job.id, self._worker.finish(held, announce))

    async def _look(self, owner: str) -> None:
        while True:
            try:
                await self._scan()
                self._take_up(owner)
            except StoreError as error:
                log.warning("the listing of jobs cannot be read: %s", error.code)
                for seen in self._seen.values():  # nor could their owners write a heartbeat
                    seen.since = time.monotonic()
            except Exception as error:  # a replica that looks no more would not be noticed
                unforeseen(error, "the look at the jobs")
            with suppress(TimeoutError):  # not wait_for, which in Python 3.11 may swallow being cancelled
                async with asyncio.timeout(self._settings.scan_seconds):
                    await self._wake.wait()
            self._wake.clear()

    async def _listen(self) -> None:
        board, after = "", 0
        while True:
            try:
                board, after, notices = await self._board.notices(board, after, NOTICE_SECONDS)
            except Exception:  # whatever keeps the board away: the next look finds what it would have told
                await asyncio.sleep(PAUSE)
                continue
            for kind, job_id in notices:
                if kind == "stopped":
                    self.stop(job_id)
            if notices:
                self._wake.set()

    async def _scan(self) -> None:
        began = time.monotonic()
        listed = await asyncio.to_thread(lambda: list(self._jobs.open_jobs()))
        readers = asyncio.Semaphore(READERS)

        async def read(entry: Listed) -> None:
            try:
                async with readers:
                    held = await asyncio.to_thread(self._jobs.read, entry.tenant, entry.id)
            except StoreCorrupt:  # of another version of this service, say, which then runs it
                log.exception("job %s cannot be read here", entry.id)
                self._damaged[entry.id] = entry.etag, time.monotonic() + self._settings.lease_seconds
                self._seen.pop(entry.id, None)
                return
            if held is not None:
                self._seen[entry.id] = _Seen(held, time.monotonic())

        await asyncio.gather(*(read(entry) for entry in listed if not self._knows(entry)))
        ids = {entry.id for entry in listed}
        self._seen = {job_id: seen for job_id, seen in self._seen.items() if job_id in ids}
        self._damaged = {job_id: one for job_id, one in self._damaged.items() if job_id in ids}
        newer = {job_id: one for job_id, one in self._accepted.items() if one[1] > began and job_id not in ids}
        self._accepted = newer
        jobs = [seen.held.job for seen in self._seen.values()]
        self._queue = {job.id: place for place, job in enumerate(in_turn(jobs))}
        self._open = Counter(job.tenant for job in jobs if not job.over)

    def _knows(self, entry: Listed) -> bool:
        seen, (etag, until) = self._seen.get(entry.id), self._damaged.get(entry.id, ("", 0.0))
        return (seen is not None and seen.held.etag == entry.etag) or (etag == entry.etag and time.monotonic() < until)

    def _take_up(self, owner: str) -> None:
        """Begin what nobody does: ends that are not settled, running jobs without heartbeats, the next in the queue."""
        now = time.monotonic()
        self._resting = {job_id: until for job_id, until in self._resting.items() if until > now}
        busy = self._tasks.keys() | self._ending.keys() | self._resting.keys() | self._worker.telling
        idle = {job_id: seen for job_id, seen in self._seen.items() if job_id not in busy}
        long_ago = now - self._settings.lease_seconds
        alone = [seen.held for seen in idle.values() if seen.since <= long_ago and seen.held.job.state != "queued"]
        for held in [held for held in alone if held.job.over][:READERS]:
            self._begin(self._ending, held.job.id, self._worker.finish(held))
        orphans = [held for held in alone if not held.job.over]
        queue = [idle[job_id].held for job_id in self._queue if job_id in idle]
        for held in (orphans + queue)[: max(0, self._settings.max_running - len(self._tasks))]:
            self._begin(self._tasks, held.job.id, self._worker.run(held, owner))

    def _begin(self, among: dict[str, asyncio.Task[bool]], job_id: str, work: Coroutine[Any, Any, bool]) -> None:
        def ended(task: asyncio.Task[bool]) -> None:
            del among[job_id]
            failed = not task.cancelled() and task.exception() is not None
            if failed:
                log.error("job %s: its runner failed: %s", job_id, type(task.exception()).__name__)
            if failed or (not task.cancelled() and not task.result()):  # or the next look would begin it at once again
                pause = self._settings.lease_seconds if failed else self._settings.scan_seconds
                self._resting[job_id] = time.monotonic() + pause
            else:
                self._wake.set()  # there is room for another

        among[job_id] = asyncio.ensure_future(work)
        among[job_id].add_done_callback(ended)

"""Board: where the ingress replicas tell each other, quickly, what happens to jobs. The store is the truth.

All of it is soft: a board that is lost comes back empty, the owners of running jobs tell it again what it misses, and
whoever asks it for a job that it does not know asks the store.
"""

import asyncio
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.progress import BEGINNING, Position, ServerEvent

MOST_JOBS = 20_000
MOST_NOTICES = 20_000
MOST_BYTES = 64_000_000  # of events
EVENT_BYTES = 500  # of one beside its data, roughly


class Notice(NamedTuple):
    """Something that every ingress replica should look at: `queued`, or `stopped`."""

    kind: str
    job_id: str


class Step(NamedTuple):
    """How far an attempt at a job is: steps done, and in all."""

    attempt: int
    done: int
    total: int


class News(NamedTuple):
    """Notices since the last time, and what to name the next time."""

    board: str
    after: int
    notices: tuple[Notice, ...]


@dataclass(slots=True)
class _Log:
    """The events of one job, in order."""

    events: list[ServerEvent] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    since: float = 0.0

    @property
    def over(self) -> bool:
        return bool(self.events) and self.events[-1].ends

    def count(self, attempt: int) -> int:
        return sum(event.at.attempt == attempt for event in self.events)


class Board:
    """Events of jobs for whoever watches them, and notices for the ingress replicas."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: for which the events of a job are kept after the last of them."""
        self._seconds = seconds
        self._id = uuid.uuid4().hex
        self._logs: OrderedDict[str, _Log] = OrderedDict()
        self._steps: dict[str, Step] = {}  # of jobs that are not over
        self._bytes = 0
        self._notices: deque[Notice] = deque(maxlen=MOST_NOTICES)
        self._noticed, self._count = asyncio.Event(), 0

    async def publish(self, job_id: str, attempt: int, first: int, events: Sequence[ServerEvent]) -> int:
        """Add events of an attempt, the first of which is its number `first`; returns how many of it are known now.

        Where that is less than `first`, those before are missing: publish from there. An attempt that has been taken
        over adds nothing.
        """
        log = self._log(job_id)
        known = log.count(attempt)
        if log.over or (log.events and log.events[-1].at.attempt > attempt):
            return first + len(events)
        if first <= known:
            self._extend(job_id, log, events[known - first :])
        return max(known, first + len(events)) if first <= known else known

    async def end(self, job_id: str, name: str, data: Mapping[str, Any]) -> None:
        """The end of a job that is not its owner's doing, after whatever is known of it."""
        log = self._log(job_id)
        if not log.over:
            attempt = log.events[-1].at.attempt if log.events else 0
            self._extend(job_id, log, [ServerEvent(Position(attempt, log.count(attempt)), name, data)])

    async def after(self, job_id: str, position: Position = BEGINNING, seconds: float = 0.0) -> list[ServerEvent]:
        """The events of a job beyond a position; where there are none yet, waits for some up to `seconds`."""
        deadline = time.monotonic() + seconds
        log = self._log(job_id)
        while True:
            found = [event for event in log.events if event.at > position]
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await log.changed.wait()

    async def steps(self) -> Mapping[str, Step]:
        """How far the jobs are that are not over, as far as that is known here."""
        return dict(self._steps)

    async def notify(self, kind: str, job_id: str) -> None:
        """Tell every ingress replica."""
        self._notices.append(Notice(kind, job_id))
        self._count += 1
        self._noticed.set()
        self._noticed = asyncio.Event()

    async def notices(self, board: str, after: int, seconds: float) -> News:
        """What was notified beyond `after` on this very board; waits for something up to `seconds`.

        Who names another board, one that is lost say, begins at now: what it may have missed it finds in the store.
        """
        if board != self._id:
            return News(self._id, self._count, ())
        if self._count <= after:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._noticed.wait()
        fresh = min(self._count - after, len(self._notices))
        return News(self._id, self._count, tuple(self._notices)[len(self._notices) - fresh :])

    def _log(self, job_id: str) -> _Log:
        self._drop()
        log = self._logs.setdefault(job_id, _Log())
        log.since = time.monotonic()
        self._logs.move_to_end(job_id)
        return log

    def _extend(self, job_id: str, log: _Log, events: Sequence[ServerEvent]) -> None:
        log.events.extend(events)
        for event in events:
            if event.name == "started":
                self._steps.pop(job_id, None)
            elif event.name == "step":
                self._steps[job_id] = Step(event.at.attempt, event.data["done"], event.data["total"])
        if log.over:
            self._steps.pop(job_id, None)
        self._bytes += sum(_size(event) for event in events)
        log.changed.set()
        log.changed = asyncio.Event()

    def _drop(self) -> None:
        """Forget jobs whose last event is long ago, and the oldest where there is too much."""
        old = time.monotonic() - self._seconds
        while self._logs:
            job_id, log = next(iter(self._logs.items()))
            if log.since > old and len(self._logs) <= MOST_JOBS and self._bytes <= MOST_BYTES:
                return  # the longest untouched is first
            del self._logs[job_id]
            self._steps.pop(job_id, None)
            self._bytes -= sum(_size(event) for event in log.events)


def _size(event: ServerEvent) -> int:
    return EVENT_BYTES + len(str(event.data))

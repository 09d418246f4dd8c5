"""Reporter: what an owner tells the board of one attempt, in order, and again where the board has forgotten."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from deployments.board import News, Step
from pipeline.events import Event, Stepped
from pipeline.progress import Position, ServerEvent, told

PAUSE = 0.5  # seconds between two tries to reach a board that does not answer
GATHER = 0.2  # seconds between two calls to the board in which events are gathered; slower ones are told at once
FLUSH = 3.0  # seconds for which an end is worth telling; whoever misses it finds it in the store


class BoardClient(Protocol):
    """The board as its callers see it; a call raises whatever keeps it from being answered."""

    def publish(self, job_id: str, attempt: int, first: int, events: Sequence[ServerEvent]) -> Awaitable[int]:
        """See deployments.board.Board."""

    def after(self, job_id: str, position: Position, seconds: float) -> Awaitable[list[ServerEvent]]:
        """See deployments.board.Board."""

    def steps(self) -> Awaitable[Mapping[str, Step]]:
        """See deployments.board.Board."""

    def end(self, job_id: str, name: str, data: Mapping[str, Any]) -> Awaitable[None]:
        """See deployments.board.Board."""

    def notify(self, kind: str, job_id: str) -> Awaitable[None]:
        """See deployments.board.Board."""

    def notices(self, board: str, after: int, seconds: float) -> Awaitable[News]:
        """See deployments.board.Board."""


class Reporter:
    """The events of one attempt at a job, and how far its pictures have come."""

    def __init__(self, board: BoardClient, job_id: str, attempt: int, gather: float = GATHER) -> None:
        self._board, self._job_id, self._attempt, self._gather = board, job_id, attempt, gather
        self._events: list[ServerEvent] = []
        self._more, self._sent = asyncio.Event(), 0
        self._hurry = asyncio.Event()  # nothing is gathered any more
        self._steps: dict[int, tuple[int, int]] = {}
        self._pictures = 0
        self._pump = asyncio.ensure_future(self._publish())

    @property
    def progress(self) -> tuple[int, int] | None:
        """Steps done, and steps in all, of all pictures; None before the first."""
        if not self._steps:
            return None
        total = max(total for _, total in self._steps.values())
        return sum(done for done, _ in self._steps.values()), total * self._pictures

    def begin(self, pictures: int) -> None:
        """So many pictures are begun, from their first step; told again only where there had been steps before."""
        if self._steps or not self._events:
            self._add("started", {"attempt": self._attempt})
        self._pictures, self._steps = pictures, {}

    def hear(self, number: int, event: Event) -> list[tuple[str, dict[str, Any]]]:
        """What an engine says of picture `number`; returns what watchers are told of it, by name."""
        if isinstance(event, Stepped):
            self._steps[number] = (event.done, event.total)
        named = told(number, event)
        if named is None:
            return []
        name, data = named
        if self.progress is not None:
            data |= {"done": self.progress[0], "total": self.progress[1]}
        self._add(name, data)
        return [(name, data)]

    def end(self, state: str, data: Mapping[str, Any]) -> None:
        """The end of the job."""
        self._add(state, data)

    async def close(self) -> None:
        """Wait until all is told, but not for long."""
        self._hurry.set()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH):
                    while self._sent < len(self._events):
                        await asyncio.sleep(0.01)
        finally:
            self._pump.cancel()

    def _add(self, name: str, data: Mapping[str, Any]) -> None:
        event = ServerEvent(Position(self._attempt, len(self._events)), name, data)
        self._events.append(event)
        self._more.set()
        if event.ends:
            self._hurry.set()

    async def _publish(self) -> None:
        clock, due = asyncio.get_running_loop().time, 0.0
        while True:
            await self._more.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._hurry.wait()
            self._more.clear()
            due = clock() + self._gather
            while self._sent < len(self._events):
                batch = self._events[self._sent :]
                try:
                    self._sent = await self._board.publish(self._job_id, self._attempt, self._sent, batch)
                except Exception:  # whatever keeps the board away: nothing depends on it
                    await asyncio.sleep(PAUSE)

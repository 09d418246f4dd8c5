"""Engine: many pictures in one FLUX, one step at a time.

    submit(work) -> ticket      step()      finish()      cancel(ticket)

Each `step` chooses which pictures go on (pipeline/schedule.py), and lets those of one shape share a forward pass where
that was measured to pay. So a newcomer is considered within one step, a short job is not held behind a long one, and
whoever is cancelled or too late leaves at the next step. The engine knows no Ray, no threads and no tensors: a Painter
does the work. `submit` and `cancel` may be called while `step` and `finish` run, each in a thread of its own.
"""

import itertools
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from pipeline.curves import Curves, Shape
from pipeline.errors import Cancelled, DeadlineExceeded
from pipeline.events import Done, Event, Failed, Previewed, Queued, Stepped
from pipeline.schedule import Schedule, Ticket

BEGINNING = 0.1  # of a step: how long newcomers may hold it up, of which one always begins


class Painter(Protocol):
    """Who draws. `work` is what was submitted; a `drawing` is all that belongs to a picture that has begun."""

    def shape(self, work: Any) -> Shape:
        """What its rows must have in common with others to share a pass."""

    def steps(self, work: Any) -> int:
        """How many steps it has."""

    def passes(self, work: Any, done: int) -> int:
        """How many passes of one row are left after `done` steps."""

    def begin(self, work: Any) -> Any:
        """Its drawing before the first step."""

    def advance(self, drawings: Sequence[Any]) -> None:
        """One step of each. Where it raises, no drawing has changed."""

    def preview(self, drawing: Any) -> Any:
        """A small picture of what it will be."""

    def finish(self, drawing: Any) -> Any:
        """The finished picture; raises PictureInvalid where the numbers are none."""

    def relieve(self, error: Exception) -> bool:
        """Whether something failed for want of memory; what is free is then given back to the device."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Pictures in the engine now, and what it has done since it was made."""

    waiting: int
    running: int
    drawn: int
    steps: int
    rows: int
    done: int
    failed: int
    cancelled: int
    previews_failed: int


class Engine:
    """Draws the pictures of its tickets with one Painter."""

    def __init__(  # noqa: PLR0913 - who draws, what it takes, and four bounds
        self,
        painter: Painter,
        curves: Curves,
        max_jobs: int = 16,
        max_rows: int = 8,
        preview_steps: int = 0,
        clock: Callable[[], float] = time.monotonic,
        max_begun: int | None = None,
    ) -> None:
        """`preview_steps`: a preview after every so many steps; 0: none.

        `max_begun`: pictures that have begun and not ended, each of which holds memory; None: all.
        """
        self._painter, self._curves, self._clock, self._preview_steps = painter, curves, clock, preview_steps
        most = max_jobs if max_begun is None else max_begun
        self._schedule = Schedule(painter.passes, curves, max_jobs, max_rows, most)
        self._numbers = itertools.count(1)
        self._open: dict[int, Ticket] = {}  # all that have not ended
        self._incoming: deque[Ticket] = deque()
        self._tickets: list[Ticket] = []  # only `step` touches it
        self._drawn: deque[Ticket] = deque()
        self._ending = threading.Lock()  # `step` and `finish` both end pictures
        self._steps = self._rows = self._done = self._failed = self._cancelled = self._previews_failed = 0

    def submit(
        self,
        work: Any,
        listener: Callable[[Event], None] = lambda _: None,
        priority: int = 0,
        seconds: float = math.inf,
        previews: bool = True,
    ) -> Ticket:
        """Take a picture in. Its events go to `listener`, which must not take long.

        Pictures of a higher `priority` go first. After `seconds` it fails with DeadlineExceeded, as it does at once
        where it could not be in time if it were alone; raises Overloaded. `previews`: whether any is made.
        """
        now = self._clock()
        shape, steps = self._painter.shape(work), self._painter.steps(work)
        ticket = Ticket(next(self._numbers), work, shape, steps, priority, now + seconds, listener, previews)
        others = [other for other in list(self._open.values()) if not other.cancelled]
        self._schedule.admit(ticket, others, now)
        listener(Queued(len(others)))
        self._open[ticket.number] = ticket
        self._incoming.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Let a picture leave at the next step, or before it is finished; nothing where it has ended."""
        ticket.cancelled = True

    def step(self) -> bool:
        """One step of the pictures whose turn it is; False where none can go on before another ends."""
        while self._incoming:
            self._tickets.append(self._incoming.popleft())
        self._tickets = [ticket for ticket in self._tickets if not self._gone(ticket)]
        started = self._clock()
        batch = self._schedule.choose(self._tickets, self._begun, started)
        if not batch:
            return False
        if any(ticket.drawing is None for ticket in batch):
            batch = self._begin(batch, started)
        if batch:
            advanced = self._advance(batch)
            self._steps += 1
            self._rows += len(batch)
            self._schedule.account(self._tickets, batch, self._clock() - started)
            for ticket in advanced:
                self._tell_progress(ticket)
        return True

    def finish(self) -> bool:
        """Decode one picture whose steps are over; False where none waits."""
        if not self._drawn:
            return False
        ticket = self._drawn.popleft()
        if self._gone(ticket):
            return True
        began = self._clock()
        picture = attempt(partial(self._painter.finish, ticket.drawing))
        self._schedule.decoded(self._clock() - began)
        if isinstance(picture, Exception):  # whatever it is, it is this picture's alone
            self._end(ticket, Failed(picture))
            self._painter.relieve(picture)
        else:
            self._end(ticket, Done(picture))
        return True

    @property
    def has_drawn(self) -> bool:
        """Whether a picture waits to be decoded."""
        return bool(self._drawn)

    def stats(self) -> EngineStats:
        """Counts until now."""
        tickets = list(self._open.values())
        drawn = sum(ticket.done == ticket.steps for ticket in tickets)
        running = sum(ticket.drawing is not None for ticket in tickets) - drawn
        waiting = len(tickets) - running - drawn
        counts = self._steps, self._rows, self._done, self._failed, self._cancelled, self._previews_failed
        return EngineStats(waiting, running, drawn, *counts)

    def _begun(self) -> int:
        return sum(ticket.drawing is not None for ticket in list(self._open.values()))

    def _begin(self, chosen: list[Ticket], started: float) -> list[Ticket]:
        """The chosen whose drawings are there. Newcomers that would hold up the others begin in later steps."""
        batch, begins = [], False
        patience = BEGINNING * self._curves.seconds(chosen[0].shape, 1) if self._curves.known else 0.0
        for ticket in chosen:
            if ticket.drawing is None:
                if begins and self._clock() - started > patience:
                    continue
                begins = True
                self._begin_one(ticket)
            if ticket.drawing is not None:
                batch.append(ticket)
        return batch

    def _begin_one(self, ticket: Ticket) -> None:
        drawing = attempt(partial(self._painter.begin, ticket.work))
        if not isinstance(drawing, Exception):
            ticket.drawing = drawing
            return
        scarce, begun = self._painter.relieve(drawing), self._begun()
        if scarce and begun:
            ticket.room = begun  # until one of those ends
        else:
            self._drop(ticket, drawing)  # a mask that is no picture, say

    def _advance(self, batch: list[Ticket]) -> list[Ticket]:
        """Step a batch; where that fails, each picture by itself, so that only the failing one ends."""
        failure = attempt(partial(self._painter.advance, [ticket.drawing for ticket in batch]))
        if failure is None:
            return batch
        scarce = self._painter.relieve(failure)
        if len(batch) == 1 and not scarce:
            self._drop(batch[0], failure)
            return []
        del failure
        return [ticket for ticket in batch if self._advance_alone(ticket)]

    def _advance_alone(self, ticket: Ticket) -> bool:
        failure = attempt(partial(self._painter.advance, [ticket.drawing]))
        if failure is not None:
            self._drop(ticket, failure)
            self._painter.relieve(failure)
        return failure is None

    def _drop(self, ticket: Ticket, error: Exception) -> None:
        self._tickets.remove(ticket)
        self._end(ticket, Failed(error))

    def _tell_progress(self, ticket: Ticket) -> None:
        ticket.done += 1
        ticket.listener(Stepped(ticket.done, ticket.steps))
        if ticket.done == ticket.steps:
            self._tickets.remove(ticket)
            self._drawn.append(ticket)
        elif ticket.previews and self._preview_steps and ticket.done % self._preview_steps == 0:
            pixels = attempt(partial(self._painter.preview, ticket.drawing))
            if isinstance(pixels, Exception):  # the picture itself may be fine
                self._previews_failed += 1
                self._painter.relieve(pixels)
            else:
                ticket.listener(Previewed(pixels))

    def _gone(self, ticket: Ticket) -> bool:
        """Whether a picture goes without being finished, as it was cancelled or is too late."""
        if ticket.cancelled:
            self._end(ticket, Failed(Cancelled("The request was cancelled; its picture was not finished.")))
        elif self._clock() >= ticket.expires:
            late = "The picture was not finished in its time; try later, or with fewer steps or pixels."
            self._end(ticket, Failed(DeadlineExceeded(late)))
        else:
            return False
        return True

    def _end(self, ticket: Ticket, event: Done | Failed) -> None:
        ticket.drawing = None  # at once: a ticket may be kept, its tensors must not be
        del self._open[ticket.number]
        with self._ending:
            if isinstance(event, Done):
                self._done += 1
            elif isinstance(event.error, Cancelled):
                self._cancelled += 1
            else:
                self._failed += 1
        ticket.listener(event)


def attempt(call: Callable[[], Any]) -> Any:
    """What a call gives, or the exception that it raised, which still tells where but keeps nothing from there alive.

    An exception holds the frames that it passed, and these hold tensors; what is tried next may need their memory.
    """
    try:
        return call()
    except Exception as error:
        raised = [error]  # popped below: a name here would hold it, and its traceback this frame
    for linked in (raised[0], raised[0].__cause__, raised[0].__context__):
        if linked is not None:
            traceback.clear_frames(linked.__traceback__)
    del linked
    return raised.pop()

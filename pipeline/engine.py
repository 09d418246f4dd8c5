"""Engine: many pictures in one FLUX, one step at a time.

    submit(work) -> ticket      step()      finish()      cancel(ticket)

Each `step` chooses which pictures go on, and lets those of one shape share a forward pass where that was measured to
pay. So a newcomer is considered within one step, a short job is not held behind a long one, and whoever is cancelled or
too late leaves at the next step. The engine knows no Ray, no threads and no tensors: a Painter does the work. `submit`
and `cancel` may be called while `step` and `finish` run, each in a thread of its own.
"""

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.curves import Curves, Shape
from pipeline.errors import Cancelled, DeadlineExceeded, Overloaded
from pipeline.events import Done, Event, Failed, Previewed, Queued, Stepped


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


@dataclass(slots=True, eq=False)
class Ticket:
    """A picture in the engine; only the engine changes it."""

    number: int
    work: Any
    shape: Shape
    steps: int
    priority: int
    submitted: float
    expires: float
    listener: Callable[[Event], None]
    previews: bool
    cancelled: bool = False
    drawing: Any = None
    done: int = 0
    overtaken: float = 0.0  # seconds in which pictures that came later went on and this one did not


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


class Engine:
    """Schedules pictures over one Painter."""

    def __init__(
        self,
        painter: Painter,
        curves: Curves,
        max_jobs: int = 16,
        max_rows: int = 8,
        preview_steps: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`preview_steps`: a preview after every so many steps; 0: none."""
        self._painter, self._curves, self._clock = painter, curves, clock
        self._max_jobs, self._max_rows, self._preview_steps = max_jobs, max_rows, preview_steps
        self._numbers = itertools.count(1)
        self._open: dict[int, Ticket] = {}  # all that have not ended
        self._incoming: deque[Ticket] = deque()
        self._tickets: list[Ticket] = []  # only `step` touches it
        self._drawn: deque[Ticket] = deque()
        self._stepping: float | None = None
        self._ending = threading.Lock()  # `step` and `finish` both end pictures
        self._steps = self._rows = self._done = self._failed = self._cancelled = 0

    def submit(
        self,
        work: Any,
        listener: Callable[[Event], None] = lambda _: None,
        priority: int = 0,
        seconds: float = math.inf,
        previews: bool = True,
    ) -> Ticket:
        """Take a picture in. Its events go to `listener`, which must not take long; raises Overloaded.

        Pictures of a higher `priority` go first. After `seconds` it fails with DeadlineExceeded. `previews`: whether
        any is made.
        """
        now = self._clock()
        shape, steps = self._painter.shape(work), self._painter.steps(work)
        ticket = Ticket(next(self._numbers), work, shape, steps, priority, now, now + seconds, listener, previews)
        others = [other for other in list(self._open.values()) if not other.cancelled]
        if len(others) >= self._max_jobs:
            raise Overloaded("The denoiser has all the work it can take; try again after the time in Retry-After.")
        if now + self._earliest(ticket, others) > ticket.expires:
            raise Overloaded("The denoiser cannot finish the picture in its time; try later, or give it more time.")
        listener(Queued(len(others)))
        self._open[ticket.number] = ticket
        self._incoming.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Let a picture leave at the next step, or before it is finished; nothing where it has ended."""
        ticket.cancelled = True

    def step(self) -> bool:
        """One step of the pictures whose turn it is; False where none is left to draw."""
        while self._incoming:
            self._tickets.append(self._incoming.popleft())
        self._tickets = [ticket for ticket in self._tickets if not self._gone(ticket)]
        batch = self._choose()
        if not batch:
            return False
        self._stepping = started = self._clock()
        try:
            advanced = self._advance(batch)
        finally:
            self._stepping = None
        self._account(batch, self._clock() - started)
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
        try:
            picture = self._painter.finish(ticket.drawing)
        except Exception as error:  # whatever it is, it is this picture's alone
            self._end(ticket, Failed(error))
        else:
            self._end(ticket, Done(picture))
        return True

    @property
    def has_drawn(self) -> bool:
        """Whether a picture waits to be decoded."""
        return bool(self._drawn)

    def stepping_seconds(self) -> float:
        """How long the step that runs now has been running; 0 where none does."""
        started = self._stepping
        return 0.0 if started is None else self._clock() - started

    def stats(self) -> EngineStats:
        """Counts until now."""
        tickets = list(self._open.values())
        drawn = sum(ticket.done == ticket.steps for ticket in tickets)
        running = sum(ticket.drawing is not None for ticket in tickets) - drawn
        waiting = len(tickets) - running - drawn
        counts = self._steps, self._rows, self._done, self._failed, self._cancelled
        return EngineStats(waiting, running, drawn, *counts)

    def _earliest(self, ticket: Ticket, others: Sequence[Ticket]) -> float:
        """Seconds until a picture ends at best: what goes first, in passes shared as well as can be, then its own."""
        if not self._curves.known:
            return 0.0
        first = [other for other in others if self._rank(other) < self._rank(ticket)]
        if not first:
            return 0.0  # whoever would run at once is taken: if the curve is wrong, the picture itself corrects it
        shared = sum(self._left(other) / self._curves.gain(other.shape, self._max_rows) for other in first)
        return shared + self._left(ticket)

    def _choose(self) -> list[Ticket]:
        """The pictures that go on: the first in rank, and of its shape as many as end sooner together."""
        if len(self._tickets) < 2:
            return list(self._tickets)
        ranked = sorted(self._tickets, key=self._rank)
        first = ranked[0]
        alike = [t for t in ranked if t.shape == first.shape and t.priority == first.priority]
        return alike[: self._curves.best_rows(first.shape, len(alike), self._max_rows)]

    def _rank(self, ticket: Ticket) -> tuple[Any, ...]:
        """What has the least left to do goes first, as that makes the mean wait the shortest; of equals, the older.

        Nobody is overtaken by later ones for longer than its own work takes, so that long jobs end too.
        """
        patient = ticket.overtaken < self._left(ticket, done=0)
        return -ticket.priority, *((1, self._left(ticket)) if patient else (0, 0.0)), ticket.number

    def _left(self, ticket: Ticket, done: int | None = None) -> float:
        """Seconds of a picture's own steps, alone, from `done` on; from where it is."""
        passes = self._painter.passes(ticket.work, ticket.done if done is None else done)
        return passes * self._curves.seconds(ticket.shape, 1)

    def _advance(self, batch: list[Ticket]) -> list[Ticket]:
        """Step a batch; where that fails, each row by itself, so that only the failing one ends."""
        begun = [ticket for ticket in batch if self._begun(ticket)]
        if not begun:
            return []
        try:
            self._painter.advance([ticket.drawing for ticket in begun])
        except Exception as error:  # of a batch nobody knows yet whose it is
            if len(begun) > 1:
                went_well = [ticket for ticket in begun if self._advance([ticket])]
                if len(went_well) == len(begun):  # no row's fault: too many, say, for the memory
                    self._curves.forbid(begun[0].shape, len(begun))
                return went_well
            self._drop(begun[0], error)
            return []
        return begun

    def _begun(self, ticket: Ticket) -> bool:
        if ticket.drawing is None:
            try:
                ticket.drawing = self._painter.begin(ticket.work)
            except Exception as error:  # a mask that is no picture, say
                self._drop(ticket, error)
                return False
        return True

    def _drop(self, ticket: Ticket, error: Exception) -> None:
        self._tickets.remove(ticket)
        self._end(ticket, Failed(error))

    def _account(self, batch: list[Ticket], seconds: float) -> None:
        self._steps += 1
        self._rows += len(batch)
        youngest = max(ticket.number for ticket in batch)
        for ticket in self._tickets:
            if ticket.number < youngest and ticket not in batch:
                ticket.overtaken += seconds

    def _tell_progress(self, ticket: Ticket) -> None:
        ticket.done += 1
        ticket.listener(Stepped(ticket.done, ticket.steps))
        if ticket.done == ticket.steps:
            self._tickets.remove(ticket)
            self._drawn.append(ticket)
        elif ticket.previews and self._preview_steps and ticket.done % self._preview_steps == 0:
            try:
                ticket.listener(Previewed(self._painter.preview(ticket.drawing)))
            except Exception as error:  # this picture's alone, and the engine goes on
                self._drop(ticket, error)

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

"""Schedule: of the pictures in an engine, which go on with the next step, and which are not let in."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.curves import Curves, Shape
from pipeline.errors import DeadlineExceeded, Overloaded
from pipeline.events import Event


@dataclass(slots=True, eq=False)
class Ticket:
    """A picture in an engine; only the engine and its schedule change it."""

    number: int
    work: Any
    shape: Shape
    steps: int
    priority: int
    expires: float
    listener: Callable[[Event], None]
    previews: bool
    cancelled: bool = False
    drawing: Any = None
    done: int = 0
    overtaken: float = 0.0  # seconds in which pictures that came later went on and this one did not
    room: float = math.inf  # it begins only beside fewer begun pictures: beside so many the memory was too short


class Schedule:
    """Orders pictures by what their steps cost, their deadlines and how long they have been passed over."""

    def __init__(
        self, passes: Callable[[Any, int], int], curves: Curves, max_jobs: int, max_rows: int, max_begun: int
    ) -> None:
        """At most `max_jobs` pictures, `max_begun` of them begun, `max_rows` rows in a pass.

        `passes(work, done)`: see pipeline.engine.Painter.
        """
        self._passes, self._curves = passes, curves
        self._max_jobs, self._max_rows, self._max_begun = max_jobs, max_rows, max_begun
        self._pause = 0.0  # seconds that a step takes which goes on with others

    def admit(self, ticket: Ticket, others: Sequence[Ticket], now: float) -> None:
        """Raises DeadlineExceeded for what even alone cannot be in time, Overloaded where others leave no room."""
        left = self.left(ticket)
        if now >= ticket.expires or (self._curves.measured(ticket.shape) and now + left > ticket.expires):
            raise DeadlineExceeded(
                "The picture cannot be finished in its time; give it more, or fewer steps or pixels."
            )
        if len(others) >= self._max_jobs:
            raise Overloaded("The denoiser has all the work it can take; try again after the time in Retry-After.")
        if not self._curves.known:
            return  # its seconds are no seconds yet
        first = [other for other in others if self._goes_first(other, ticket, now)]
        shared = sum(self.left(other) / self._curves.gain(other.shape, self._max_rows) for other in first)
        if first and now + shared + left > ticket.expires:
            raise Overloaded("The denoiser cannot finish the picture in its time; try later, or give it more time.")

    def choose(self, tickets: Sequence[Ticket], begun: Callable[[], int], now: float) -> list[Ticket]:
        """The pictures that go on: the first in rank, and of its shape as many as end sooner together.

        `begun`: how many have a drawing, those that wait to be decoded included.
        """
        if len(tickets) > 1:
            tickets = sorted(tickets, key=lambda ticket: self._rank(ticket, now))
        newcomers = any(ticket.drawing is None for ticket in tickets)
        able = self._able(tickets, begun()) if newcomers else list(tickets)
        if len(able) < 2:
            return able
        first = able[0]
        alike = [t for t in able if t.shape == first.shape and t.priority == first.priority]
        rows = [self._rows(ticket) for ticket in alike]
        return alike[: self._curves.best_jobs(first.shape, rows, self._max_rows)]

    def account(self, tickets: Sequence[Ticket], batch: Sequence[Ticket], seconds: float) -> None:
        """A step of `batch` took so long, while the others waited."""
        self._pause = seconds
        if len(tickets) == len(batch):
            return
        youngest = max(ticket.number for ticket in batch)
        for ticket in tickets:
            if ticket.number < youngest and ticket not in batch:
                ticket.overtaken += seconds

    def left(self, ticket: Ticket) -> float:
        """Seconds of a picture's own steps from where it is, alone."""
        return self._seconds(ticket, ticket.done)

    def _able(self, ranked: Sequence[Ticket], begun: int) -> list[Ticket]:
        """Those that have begun or may begin, in order; none begins before one that waits for memory."""
        able, waits = [], False
        for ticket in ranked:
            if ticket.drawing is None:
                waits = waits or begun >= min(self._max_begun, ticket.room)
                if waits:
                    continue
                begun += 1
            able.append(ticket)
        return able

    def _rank(self, ticket: Ticket, now: float) -> tuple[int, int, float, int]:
        """What has the least left to do goes first, as that makes the mean wait the shortest; of equals, the older.

        Before these goes who would be late if it waited for one more step of others, the earliest deadline first, but
        not who will be late anyway; and before all who was overtaken by later ones for as long as its own work takes,
        so that long jobs end too.
        """
        left = self.left(ticket)
        if ticket.overtaken >= self._seconds(ticket, 0):
            return -ticket.priority, 0, 0.0, ticket.number
        slack = ticket.expires - now - left
        if self._curves.known and -self._pause <= slack <= self._pause:
            return -ticket.priority, 1, ticket.expires, ticket.number
        return -ticket.priority, 2, left, ticket.number

    def _goes_first(self, other: Ticket, ticket: Ticket, now: float) -> bool:
        """Whether another goes before a ticket even if that may become late, at which it would pass many by."""
        if self._rank(other, now) > self._rank(ticket, now):
            return False
        overtaken = other.overtaken >= self._seconds(other, 0)
        return other.priority > ticket.priority or overtaken or other.expires <= ticket.expires

    def _rows(self, ticket: Ticket) -> int:
        """Rows of its next step: 2 with true CFG."""
        return self._passes(ticket.work, ticket.done) - self._passes(ticket.work, ticket.done + 1)

    def _seconds(self, ticket: Ticket, done: int) -> float:
        return self._passes(ticket.work, done) * self._curves.seconds(ticket.shape, 1)

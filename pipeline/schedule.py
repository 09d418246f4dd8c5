"""Schedule: of the pictures in an engine, which go on with the next step, and which are not let in."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from pipeline.curves import Curves, Shape
from pipeline.errors import DeadlineExceeded, Overloaded
from pipeline.events import Event

FORGETTING = 0.9  # of the longest step, what is left of it after another
LEARNING = 0.2  # the share of a new decoding in what is known of decoding
LATE = 0.05  # of what is left of a picture that runs: so much too little time may still do
ROUNDING = 1e-9  # seconds


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
    """Orders pictures by what their steps cost, their deadlines and how long they have been passed over.

    Deadlines are kept by slack stealing: as long as all that are promised can still be kept after one more step of
    others, what has the least left to do goes first, as that makes the mean wait the shortest; else the earliest
    deadline goes. A picture that could not be in time, or would make one late that was let in before, is not let in.
    """

    def __init__(
        self, passes: Callable[[Any, int], int], curves: Curves, max_jobs: int, max_rows: int, max_begun: int
    ) -> None:
        """At most `max_jobs` pictures, `max_begun` of them begun, `max_rows` rows in a pass.

        `passes(work, done)`: see pipeline.engine.Painter.
        """
        self._passes, self._curves = passes, curves
        self._max_jobs, self._max_rows, self._max_begun = max_jobs, max_rows, max_begun
        self._longest = 0.0  # seconds of the longest step of late
        self._decoding = 0.0  # seconds that a picture takes after its last step, as a moving mean

    def admit(self, ticket: Ticket, others: Sequence[Ticket], now: float) -> None:
        """Raises DeadlineExceeded for what even alone cannot be in time, Overloaded where others leave no room."""
        left = self._decoding + self.left(ticket)
        if now >= ticket.expires or (self._curves.measured(ticket.shape) and now + left >= ticket.expires):
            raise DeadlineExceeded(
                "The picture cannot be finished in its time; give it more, or fewer steps or pixels."
            )
        if len(others) >= self._max_jobs:
            raise Overloaded("The denoiser has all the work it can take; try again after the time in Retry-After.")
        if ticket.expires == math.inf or not self._curves.known:
            return  # it has all the time, or its seconds are no seconds yet
        if not others:
            return  # alone; where its shape was never measured, it is now
        before, then = self._slack(others, now), self._slack([*others, ticket], now)
        made_late = any(then[other] < ROUNDING <= slack for other, slack in before.items())
        if made_late or then[ticket] - self._ahead(ticket, others) < ROUNDING:
            raise Overloaded("The denoiser cannot finish the picture in its time; try later, or give it more time.")

    def choose(self, tickets: Sequence[Ticket], begun: Callable[[], int], now: float) -> list[Ticket]:
        """The pictures that go on: the first in rank, and of its shape as many as end sooner together.

        `begun`: how many have a drawing, those that wait to be decoded included.
        """
        urgent = False
        if len(tickets) > 1:
            tickets, urgent = self._ranked(tickets, now)
        newcomers = any(ticket.drawing is None for ticket in tickets)
        able = self._able(tickets, begun()) if newcomers else list(tickets)
        if len(able) < 2 or urgent:  # whoever shares a pass is slower than alone
            return able[:1]
        first = able[0]
        alike = [t for t in able if t.shape == first.shape and t.priority == first.priority]
        rows = [self._rows(ticket) for ticket in alike]
        return alike[: self._curves.best_jobs(first.shape, rows, self._max_rows)]

    def account(self, tickets: Sequence[Ticket], batch: Sequence[Ticket], seconds: float) -> None:
        """A step of `batch` took so long, while the others waited."""
        self._longest = max(seconds, FORGETTING * self._longest)
        if len(tickets) == len(batch):
            return
        youngest = max(ticket.number for ticket in batch)
        for ticket in tickets:
            if ticket.number < youngest and ticket not in batch:
                ticket.overtaken += seconds

    def decoded(self, seconds: float) -> None:
        """A picture was finished within so many seconds after its last step."""
        self._decoding += LEARNING * (seconds - self._decoding)

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

    def _ranked(self, tickets: Sequence[Ticket], now: float) -> tuple[list[Ticket], bool]:
        """The pictures in the order of their turns, and whether the first has none to spare.

        The higher priority first. Then, where a deadline would be missed after one more step of others, the deadlines
        that can be kept, the earliest first; then who was overtaken by later ones for as long as its own work takes,
        so that long jobs end too; then what has the least left to do, of equals the older; last what will be late.
        """
        left = {ticket: self.left(ticket) for ticket in tickets}
        late, urgent = self._pressing(left, now)

        def rank(ticket: Ticket) -> tuple[int, int, float, int]:
            if ticket in late:
                return -ticket.priority, 3, ticket.expires, ticket.number
            if urgent and ticket.expires < math.inf:
                return -ticket.priority, 0, ticket.expires, ticket.number
            if self._overtaken(ticket):
                return -ticket.priority, 1, 0.0, ticket.number
            return -ticket.priority, 2, left[ticket], ticket.number

        ranked = sorted(tickets, key=rank)
        return ranked, urgent and ranked[0].expires < math.inf and ranked[0] not in late

    def _pressing(self, left: Mapping[Ticket, float], now: float) -> tuple[AbstractSet[Ticket], bool]:
        """Those that will be late whatever is done, and whether another would be after one more step of others."""
        first_end = min(ticket.expires for ticket in left)
        if first_end == math.inf or not self._curves.known:
            return frozenset(), False
        shapes = Counter(ticket.shape for ticket in left)
        step = max(self._longest, *(self._step(shape, rows) for shape, rows in shapes.items()))
        if first_end - now - sum(left.values()) - self._decoding > step:  # all of them in any order
            return frozenset(), False
        slack = self._slack(left, now)
        late = {ticket for ticket in left if slack[ticket] < -LATE * left[ticket]}
        return late, min((slack[ticket] for ticket in left if ticket not in late), default=math.inf) <= (
            1 + LATE
        ) * step

    def _step(self, shape: Shape, rows: int) -> float:
        """Seconds of the longest step that pictures of a shape may make together; alone where that wins nothing."""
        alone, rows = self._curves.seconds(shape, 1), min(rows, self._max_rows)
        together = self._curves.seconds(shape, rows)
        return together if together < rows * alone else alone

    def _slack(self, tickets: Iterable[Ticket], now: float) -> dict[Ticket, float]:
        """Seconds that each has to spare; less than none where it will be late.

        Each goes after all of a higher priority and all that are due before it, one after another: what is won by
        sharing passes is not counted on, and what will be late is not waited for.
        """
        found, ahead = {}, 0.0
        for ticket in sorted(tickets, key=lambda ticket: (-ticket.priority, ticket.expires)):
            left = self.left(ticket)
            found[ticket] = ticket.expires - now - ahead - left - self._decoding
            if found[ticket] >= -LATE * left:
                ahead += left
        return found

    def _ahead(self, ticket: Ticket, others: Sequence[Ticket]) -> float:
        """Seconds of what a newcomer cannot go before, whatever its deadline.

        Those of its priority that were overtaken for long enough, and where no more may begin, the first to end.
        """
        equals = [other for other in others if other.priority == ticket.priority]
        seconds = sum(self.left(other) for other in equals if other.expires == math.inf and self._overtaken(other))
        begun = [self.left(other) for other in others if other.drawing is not None]
        return seconds + (min(begun) if len(begun) >= self._max_begun else 0.0)

    def _overtaken(self, ticket: Ticket) -> bool:
        return ticket.overtaken > 0.0 and ticket.overtaken >= self._seconds(ticket, 0)

    def _rows(self, ticket: Ticket) -> int:
        """Rows of its next step: 2 with true CFG."""
        return self._passes(ticket.work, ticket.done) - self._passes(ticket.work, ticket.done + 1)

    def _seconds(self, ticket: Ticket, done: int) -> float:
        return self._passes(ticket.work, done) * self._curves.seconds(ticket.shape, 1)

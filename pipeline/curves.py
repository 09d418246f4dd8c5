"""Curves: how long a step takes with how many rows, and when it pays to let rows share one.

A curve is measured at start-up for some shapes, corrected by every step that runs, and borrowed from the nearest shape
where there is none. One slow step (a neighbour's work, say) moves it little, and what is not run for long returns to
what it was at the start, so that it is tried again. Jobs that arrive together end on average at (B + 1) / 2 times a
job's length one after another, and at t(B) / t(1) times it in one batch of B: so a batch pays only where
t(B) / t(1) < (B + 1) / 2.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

LEARNING = 0.2  # the share of a new measurement in what is known
FADING = 0.005  # the share of the start in what is known and not run, at every step of its shape
SLOW, FALTERING = 2.0, 5.0  # times as long as known: a step counts as so long at most, and beyond not at all
CONFIRMED = 3  # slow steps in a row: so it is
MEASURED_ROWS = (1, 2, 4, 8, 16, 32)
NO_GAIN = 0.97  # of t(1) a row: with less to win, larger batches are not measured


class Shape(NamedTuple):
    """What rows of one forward pass have in common: the grid of image tokens, and the number of text tokens."""

    rows: int
    columns: int
    text: int

    @property
    def tokens(self) -> int:
        """Tokens of one row."""
        return self.rows * self.columns + self.text


class Curves:
    """Seconds of a step by shape and number of rows. One thread writes; others may read at the same time."""

    def __init__(self) -> None:
        self._seconds: dict[Shape, dict[int, float]] = {}
        self._start: dict[Shape, dict[int, float]] = {}  # what was known of each first
        self._slow: dict[tuple[Shape, int], int] = {}  # slow steps in a row
        self._forbidden: dict[Shape, int] = {}  # so many rows, and more

    @property
    def known(self) -> bool:
        """Whether anything was measured, so that its seconds are seconds."""
        return bool(self._seconds)

    def measured(self, shape: Shape) -> bool:
        """Whether steps of this very shape were measured."""
        return shape in self._seconds

    def measure(self, seconds: Callable[[Shape, int], float], shapes: Iterable[Shape], max_rows: int) -> None:
        """Fill the curves; `seconds` runs one step of so many rows and tells how long it took, infinity if it failed.

        A shape of which a single row fails has none.
        """
        for shape in shapes:
            curve: dict[int, float] = {}
            for rows in (rows for rows in MEASURED_ROWS if rows <= max_rows):
                seconds(shape, rows)  # the first is slower: memory is laid out, kernels are chosen
                found = min(seconds(shape, rows) for _ in range(2))
                if math.isinf(found):
                    self._forbidden[shape] = rows
                    break
                curve[rows] = found
                if rows > 1 and found > NO_GAIN * rows * curve[1]:
                    break
            if curve:
                self._seconds[shape], self._start[shape] = curve, dict(curve)

    def learn(self, shape: Shape, rows: int, seconds: float) -> None:
        """Correct a curve by a step that ran."""
        curve = self._of(shape)
        known = curve.get(rows)
        if known is None:
            curve[rows] = self._start[shape][rows] = seconds
            return
        if len(curve) > 1:
            start = self._start[shape]
            for other in curve:
                if other != rows:
                    curve[other] += FADING * (start[other] - curve[other])
        if seconds > SLOW * known:
            slow = self._slow[shape, rows] = self._slow.get((shape, rows), 0) + 1
            if slow < CONFIRMED:
                if seconds > FALTERING * known:
                    return
                seconds = SLOW * known
        elif self._slow:
            self._slow.pop((shape, rows), None)
        curve[rows] = known + LEARNING * (seconds - known)

    def forbid(self, shape: Shape, rows: int) -> None:
        """Never again so many rows at once, or more: the memory was too short for them."""
        self._forbidden[shape] = max(2, min(rows, self._forbidden.get(shape, rows)))

    def seconds(self, shape: Shape, rows: int) -> float:
        """How long a step of `rows` rows takes; between and beyond measured points on straight lines."""
        if 1 < rows >= self._forbidden.get(shape, math.inf):
            return math.inf
        curve = self._seconds.get(shape) or self._borrowed(shape)
        if rows in curve:
            return curve[rows]
        points = sorted(curve)
        below = [point for point in points if point < rows]
        above = [point for point in points if point > rows]
        if below and above:
            low, high = below[-1], above[0]
            return curve[low] + (curve[high] - curve[low]) * (rows - low) / (high - low)
        nearest = below[-1] if below else above[0]
        return curve[nearest] * rows / nearest  # nothing is won that was not measured

    def best_jobs(self, shape: Shape, rows: Sequence[int], max_rows: int) -> int:
        """How many of the first of a queue of jobs to run at once, so that all end soonest on average.

        rows: of each job's step, in order; 2 with true CFG. At most `max_rows` in all where jobs share a pass.
        """
        alone = [self._alone(shape, own, max_rows) for own in rows]
        best, soonest = 1, self._mean_end(shape, rows, alone, 1)
        for jobs in range(2, len(rows) + 1):
            together = sum(rows[:jobs])
            if together > max_rows:
                break
            in_turn = sum(accumulate(alone[:jobs])) / jobs  # (jobs + 1) / 2 times t(1) where they are equal
            if self.seconds(shape, together) < in_turn:
                end = self._mean_end(shape, rows, alone, jobs)
                best, soonest = (jobs, end) if end < soonest else (best, soonest)
        return best

    def gain(self, shape: Shape, max_rows: int) -> float:
        """How many times as fast a row of a shared pass is at best as one alone."""
        return max(rows * self.seconds(shape, 1) / self.seconds(shape, rows) for rows in range(1, max_rows + 1))

    def width(self, shape: Shape, rows: int, max_rows: int) -> int:
        """In passes of how many rows, `max_rows` at most, `rows` rows that are all needed are done soonest."""
        return min(range(1, min(rows, max_rows) + 1), key=lambda width: self._total(shape, rows, width))

    def _alone(self, shape: Shape, rows: int, max_rows: int) -> float:
        return self.seconds(shape, 1) if rows == 1 else self._total(shape, rows, self.width(shape, rows, max_rows))

    def _total(self, shape: Shape, rows: int, width: int) -> float:
        full, rest = divmod(rows, width)
        return full * self.seconds(shape, width) + (self.seconds(shape, rest) if rest else 0.0)

    def _mean_end(self, shape: Shape, rows: Sequence[int], alone: Sequence[float], jobs: int) -> float:
        """The mean time at which jobs of one step end, when taken so many at a time."""
        now = ends = 0.0
        for at in range(0, len(rows), jobs):
            group = rows[at : at + jobs]
            now += alone[at] if len(group) == 1 else self.seconds(shape, sum(group))
            ends += len(group) * now
        return ends / len(rows)

    def _of(self, shape: Shape) -> dict[int, float]:
        if shape not in self._seconds:
            curve = self._borrowed(shape) if self._seconds else {}
            self._start[shape] = dict(curve)
            self._seconds[shape] = curve
        return self._seconds[shape]

    def _borrowed(self, shape: Shape) -> dict[int, float]:
        """The curve of the shape with the nearest number of tokens, longer or shorter as that number is."""
        if not self._seconds:
            return {1: float(shape.tokens)}  # nothing is known: any unit will do to compare jobs, and no batch pays
        # copies, made at once: another thread may write meanwhile
        nearest = min(list(self._seconds), key=lambda known: abs(known.tokens - shape.tokens))
        scale = shape.tokens / nearest.tokens
        return {rows: scale * seconds for rows, seconds in list(self._seconds[nearest].items())}

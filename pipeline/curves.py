"""Curves: how long a step takes with how many rows, and when it pays to let rows share one.

A curve is measured at start-up for some shapes, corrected by every step that runs, and borrowed from the nearest shape
where there is none. Jobs that arrive together end on average at (B + 1) / 2 times a job's length one after another, and
at t(B) / t(1) times it in one batch of B: so a batch pays only where t(B) / t(1) < (B + 1) / 2.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

LEARNING = 0.2  # the share of a new measurement in what is known
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

    @property
    def known(self) -> bool:
        """Whether anything was measured, so that its seconds are seconds."""
        return bool(self._seconds)

    def measure(self, seconds: Callable[[Shape, int], float], shapes: Iterable[Shape], max_rows: int) -> None:
        """Fill the curves; `seconds` runs one step of so many rows and tells how long it took."""
        for shape in shapes:
            curve: dict[int, float] = {}
            for rows in (rows for rows in MEASURED_ROWS if rows <= max_rows):
                seconds(shape, rows)  # the first is slower: memory is laid out, kernels are chosen
                curve[rows] = min(seconds(shape, rows) for _ in range(2))
                if rows > 1 and curve[rows] > NO_GAIN * rows * curve[1]:
                    break
            self._seconds[shape] = curve

    def learn(self, shape: Shape, rows: int, seconds: float) -> None:
        """Correct a curve by a step that ran."""
        curve = self._of(shape)
        known = curve.get(rows)
        curve[rows] = seconds if known is None else known + LEARNING * (seconds - known)

    def forbid(self, shape: Shape, rows: int) -> None:
        """Never again so many rows at once: they failed, and went well one by one."""
        self._of(shape)[rows] = math.inf

    def seconds(self, shape: Shape, rows: int) -> float:
        """How long a step of `rows` rows takes; between and beyond measured points on straight lines."""
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

    def best_rows(self, shape: Shape, jobs: int, max_rows: int) -> int:
        """How many of `jobs` equal jobs to run at once, so that they end soonest on average."""
        allowed = [1]
        alone = self.seconds(shape, 1)
        for rows in range(2, min(jobs, max_rows) + 1):
            if self.seconds(shape, rows) / alone < (rows + 1) / 2:
                allowed.append(rows)
        return min(allowed, key=lambda rows: self._mean_end(shape, jobs, rows))

    def gain(self, shape: Shape, max_rows: int) -> float:
        """How many times as fast a row of a shared pass is at best as one alone."""
        return max(rows * self.seconds(shape, 1) / self.seconds(shape, rows) for rows in range(1, max_rows + 1))

    def width(self, shape: Shape, rows: int) -> int:
        """In passes of how many rows `rows` rows, all of which are needed, are done soonest."""
        return min(range(1, rows + 1), key=lambda width: self._total(shape, rows, width))

    def _total(self, shape: Shape, rows: int, width: int) -> float:
        full, rest = divmod(rows, width)
        return full * self.seconds(shape, width) + (self.seconds(shape, rest) if rest else 0.0)

    def _mean_end(self, shape: Shape, jobs: int, rows: int) -> float:
        """The mean time at which equal jobs of one step end, when taken `rows` at a time."""
        full, rest = divmod(jobs, rows)
        batch = self.seconds(shape, rows)
        ends = rows * batch * full * (full + 1) / 2
        if rest:
            ends += rest * (full * batch + self.seconds(shape, rest))
        return ends / jobs

    def _of(self, shape: Shape) -> dict[int, float]:
        if shape not in self._seconds:
            self._seconds[shape] = self._borrowed(shape) if self._seconds else {}
        return self._seconds[shape]

    def _borrowed(self, shape: Shape) -> dict[int, float]:
        """The curve of the shape with the nearest number of tokens, longer or shorter as that number is."""
        if not self._seconds:
            return {1: float(shape.tokens)}  # nothing is known: any unit will do to compare jobs, and no batch pays
        # copies, made at once: another thread may write meanwhile
        nearest = min(list(self._seconds), key=lambda known: abs(known.tokens - shape.tokens))
        scale = shape.tokens / nearest.tokens
        return {rows: scale * seconds for rows, seconds in list(self._seconds[nearest].items())}

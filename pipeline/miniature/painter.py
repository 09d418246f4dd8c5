"""Shapes on a canvas and, with the same geometry, in a map of labels.

Shapes are polygons (n, 2) in the units of the drawing: pixels of a picture of side 256 with the head at its usual
size, x to the right and y down from the middle between the eyes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
Colour = NDArray[np.float64]  # (3,) RGB in 0..255
Plane = NDArray[Any]  # (h, w) or (h, w, channels): values over part of the canvas
Tint = Callable[[Plane, Plane], Plane]  # coordinates u, v -> what a colour is multiplied by

OVERSAMPLING = 2  # the canvas's pixels along one of the picture's
_CELL = 8  # canvas pixels along one value of a tint
_FRACTION = 4  # bits of a pixel that OpenCV's polygons count in
_LINE = np.array((52, 44, 48), np.float64)


class Painter:
    """A canvas (2 S, 2 S, 3) over a backdrop, and labels (S, S); `frame` (2, 3) leads from units to pixels."""

    def __init__(self, backdrop: NDArray[np.uint8], frame: NDArray[np.float64], flat: bool, outlined: bool) -> None:
        size = backdrop.shape[0] // OVERSAMPLING
        self._canvas: NDArray[Any] = backdrop.copy()
        self.labels: NDArray[Any] = np.zeros((size, size), np.uint8)
        self.frame = frame
        # A pixel of the picture has its centre between those of four of the canvas's.
        self._to_canvas = frame * OVERSAMPLING + [[0, 0, 0.5], [0, 0, 0.5]]
        self._from_canvas = cv2.invertAffineTransform(self._to_canvas)
        self._flat, self._outlined = flat, outlined
        self._thickness = max(1, round(OVERSAMPLING * size * 1.4 / 256))

    def fill(
        self,
        shape: Points,
        colour: ArrayLike,
        label: int | None = None,
        tint: Tint | None = None,
        line: bool = True,
    ) -> None:
        """Fill a polygon with one colour (3,), or with what the tint multiplies it by: (u, v) -> (h, w, 1 or 3)."""
        corners = _fixed(self._transformed(shape, self._to_canvas))
        rgb = np.asarray(colour, np.float64)
        if tint is None or self._flat:
            cv2.fillPoly(self._canvas, [corners], _whole(rgb), cv2.LINE_AA, _FRACTION)
        else:
            self._fill_tinted(corners, rgb, tint)
        if self._outlined and line:
            ink = 0.6 * _LINE + 0.2 * np.clip(rgb, 0, 255)
            cv2.polylines(self._canvas, [corners], True, _whole(ink), self._thickness, cv2.LINE_AA, _FRACTION)
        if label is not None:
            self.mark(shape, label)

    def stroke(self, path: Points, width: float, colour: ArrayLike, label: int | None = None) -> None:
        """A line of some width along a path (n, 2), with round ends."""
        thick = width * float(np.hypot(*self.frame[:, 0]))
        corners = _fixed(self._transformed(path, self._to_canvas))
        rgb = _whole(np.asarray(colour))
        wide = max(1, round(thick * OVERSAMPLING))
        cv2.polylines(self._canvas, [corners], False, rgb, wide, cv2.LINE_AA, _FRACTION)
        if label is not None:
            flat = _fixed(self._transformed(path, self.frame))
            cv2.polylines(self.labels, [flat], False, label, max(1, round(thick)), cv2.LINE_8, _FRACTION)

    def mark(self, shape: Points, label: int) -> None:
        """Label a polygon without drawing it."""
        cv2.fillPoly(self.labels, [_fixed(self._transformed(shape, self.frame))], label, cv2.LINE_8, _FRACTION)

    def picture(self) -> NDArray[np.uint8]:
        """The canvas at the picture's size."""
        side = self.labels.shape[0]
        return np.asarray(cv2.resize(self._canvas, (side, side), interpolation=cv2.INTER_AREA), np.uint8)

    def pixels_of(self, points: ArrayLike) -> Points:
        """Where points (n, 2) lie in the picture, in pixels; the first pixel's centre is 0, 0."""
        return self._transformed(np.asarray(points, np.float64), self.frame)

    def _fill_tinted(self, corners: NDArray[np.int32], rgb: Colour, tint: Tint) -> None:
        limit = self._canvas.shape[0]
        low = np.clip((corners.min(axis=0) >> _FRACTION) - 1, 0, limit)
        high = np.clip((corners.max(axis=0) >> _FRACTION) + 2, 0, limit)
        width, height = (int(v) for v in high - low)
        if width < 1 or height < 1:
            return
        columns, rows = -(-width // _CELL), -(-height // _CELL)
        x = low[0] + (_CELL - 1) / 2 + _CELL * np.arange(columns, dtype=np.float32)[None]
        y = low[1] + (_CELL - 1) / 2 + _CELL * np.arange(rows, dtype=np.float32)[:, None]
        (a, b, c), (d, e, f) = (tuple(np.float32(v) for v in row) for row in self._from_canvas)
        values = np.clip(tint(a * x + b * y + c, d * x + e * y + f) * rgb.astype(np.float32), 0, 255)
        field = cv2.resize(values.astype(np.uint8), (columns * _CELL, rows * _CELL), interpolation=cv2.INTER_LINEAR)
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [corners - (low << _FRACTION)], 255, cv2.LINE_8, _FRACTION)
        region = self._canvas[low[1] : high[1], low[0] : high[0]]
        cv2.copyTo(field[:height, :width], mask, region)

    @staticmethod
    def _transformed(points: Points, matrix: NDArray[np.float64]) -> Points:
        return np.asarray(points @ matrix[:, :2].T + matrix[:, 2])


def smooth(points: Sequence[Sequence[float]] | Points, closed: bool = True, steps: int = 6) -> Points:
    """A Catmull-Rom curve through points (n, 2); closed or from the first to the last."""
    given = np.asarray(points, np.float64)
    before, after = (given[-1:], given[:2]) if closed else (given[:1], given[-1:])
    ring = np.concatenate((before, given, after))
    basis = _basis(steps)
    spans = np.stack([ring[i : len(ring) - 3 + i] for i in range(4)], axis=1)  # (n, 4, 2)
    curve = (basis @ spans).reshape(-1, 2)
    return curve if closed else np.concatenate((curve, given[-1:]))


def mirrored(half: Sequence[Sequence[float]]) -> Points:
    """A closed curve, alike left and right, from its right half top to bottom."""
    right = np.asarray(half, np.float64)
    left = right[::-1] * (-1, 1)
    middle = np.abs(right[:, 0]) > 1e-6  # points on the axis occur once
    return smooth(np.concatenate((right, left[middle[::-1]])))


def ellipse(x: float, y: float, wide: float, high: float, turn: float = 0.0, corners: int = 28) -> Points:
    """An ellipse by its centre, its half axes and its turn in degrees."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    points = np.stack((wide * np.cos(angles), high * np.sin(angles)), axis=1)
    sine, cosine = np.sin(np.radians(turn)), np.cos(np.radians(turn))
    return np.asarray(points @ np.array(((cosine, sine), (-sine, cosine))) + (x, y))


def bump(u: Plane, v: Plane, x: float, y: float, wide: float, high: float) -> Plane:
    """A soft spot of height 1, for tints."""
    return np.asarray(np.exp(-(((u - x) / wide) ** 2) - ((v - y) / high) ** 2))


def _basis(steps: int) -> NDArray[np.float64]:
    t = np.arange(steps) / steps
    powers = np.stack((np.ones_like(t), t, t**2, t**3), axis=1)
    return powers @ (np.array(((0, 2, 0, 0), (-1, 0, 1, 0), (2, -5, 4, -1), (-1, 3, -3, 1))) / 2)


def _fixed(points: Points) -> NDArray[np.int32]:
    return np.round(points * (1 << _FRACTION)).astype(np.int32)


def _whole(rgb: NDArray[Any]) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in np.clip(np.round(rgb), 0, 255))
    return red, green, blue

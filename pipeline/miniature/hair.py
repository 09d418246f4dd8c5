"""Hair: a part behind the head and a part in front of it, by style."""

import numpy as np
from numpy.typing import NDArray

from pipeline.miniature.heads import HAIR, Head
from pipeline.miniature.painter import Painter, Points, bump, ellipse, mirrored, smooth
from pipeline.miniature.people import Person
from pipeline.miniature.scenes import Scene

# where hats sit: hair above is pressed to the head or hidden
HAT_LINE = -46.0
_PRESSED = -72.0


def draw_back(painter: Painter, person: Person, head: Head, scene: Scene) -> None:
    """Hair behind the neck and the head."""
    wide = head.half_width
    shape: Points | None = None
    if person.hair_style == "long":
        shape = mirrored(
            (
                (0, -78),
                (0.72 * wide, -70),
                (wide + 12, -30),
                (wide + 18, 30),
                (wide + 22, 90),
                (wide + 14, 128),
                (0, 132),
            )
        )
    elif person.hair_style == "bob":
        shape = mirrored(
            ((0, -78), (0.74 * wide, -70), (wide + 15, -30), (wide + 22, 20), (wide + 20, 62), (wide - 4, 74), (0, 72))
        )
    elif person.hair_style == "curly":
        shape = _curls(((0, -72), (38, -66), (66, -40), (74, -8), (76, 24), (70, 54), (52, 74)), 17, wide)
    elif person.hair_style == "afro":
        shape = _curls(((0, -85), (46, -78), (78, -46), (84, -8), (74, 26), (50, 46)), 10, wide)
    if shape is not None:
        painter.fill(
            _pressed(shape, scene, wide), person.hair, HAIR, _tint(0.9 if person.hair_style == "afro" else 0.76)
        )
    if person.hair_style == "buns":
        for side in (-1, 1):
            painter.fill(ellipse(side * (wide + 9), -54, 25, 24), person.hair, HAIR, _bun_tint(side * (wide + 9)))


def draw_front(painter: Painter, person: Person, head: Head, scene: Scene) -> None:
    """Hair over the forehead, the temples and the shoulders."""
    style, wide = person.hair_style, head.half_width
    if style == "bald":
        return
    if style == "mohawk":
        _mohawk(painter, person, head, scene)
        return
    painter.fill(_pressed(_cap(style, wide), scene, wide), person.hair, HAIR, _tint(1.0))
    if style == "long":
        for side in (-1, 1):
            lock = smooth(
                ((wide - 10, -24), (wide + 11, -30), (wide + 17, 20), (wide + 22, 80), (wide + 16, 122), (wide, 134))
                + ((wide - 16, 124), (wide - 8, 84), (wide - 3, 30))
            )
            painter.fill(lock * (side, 1), person.hair, HAIR, _tint(1.0))


def _cap(style: str, wide: float) -> Points:
    """The hair on top of the head: round the skull, and back along the hairline."""
    if style == "short":
        skull = ((-wide - 3, 4), (-wide - 5, -30), (-0.8 * wide, -70), (-0.2 * wide, -86), (0.5 * wide, -82))
        skull += ((0.9 * wide, -60), (wide + 5, -28), (wide + 3, 4))
        line = ((wide - 6, -14), (0.8 * wide, -36), (0.2 * wide, -38), (-0.35 * wide, -50), (-0.8 * wide, -34))
        line += ((-wide + 6, -14),)
    elif style == "bob":
        skull = ((-wide - 15, 40), (-wide - 15, -30), (-0.74 * wide, -72), (0, -82), (0.74 * wide, -72))
        skull += ((wide + 15, -30), (wide + 15, 40))
        line = ((wide - 3, 44), (wide - 5, -8), (0.86 * wide, -28), (0.4 * wide, -30), (0, -31), (-0.4 * wide, -30))
        line += ((-0.86 * wide, -28), (-wide + 5, -8), (-wide + 3, 44))
    elif style == "long":
        skull = ((-wide - 10, 0), (-wide - 10, -32), (-0.74 * wide, -72), (0, -82), (0.74 * wide, -72))
        skull += ((wide + 10, -32), (wide + 10, 0))
        line = ((wide - 4, 6), (wide - 8, -24), (0.5 * wide, -44), (0, -58), (-0.5 * wide, -44), (-wide + 8, -24))
        line += ((-wide + 4, 6),)
    elif style == "buns":
        skull = ((-wide - 3, -2), (-wide - 4, -32), (-0.74 * wide, -68), (0, -77), (0.74 * wide, -68))
        skull += ((wide + 4, -32), (wide + 3, -2))
        line = ((wide - 5, -14), (0.72 * wide, -40), (0, -50), (-0.72 * wide, -40), (-wide + 5, -14))
    else:  # curls: a bumpy fringe
        grown = 6 if style == "curly" else 2
        skull = ((-wide - grown, 0), (-wide - grown, -30), (-0.7 * wide, -70), (0, -80), (0.7 * wide, -70))
        skull += ((wide + grown, -30), (wide + grown, 0))
        line = ((wide - 4, -10), (0.8 * wide, -36), (0.5 * wide, -32), (0.2 * wide, -42), (-0.15 * wide, -34))
        line += ((-0.5 * wide, -42), (-0.8 * wide, -30), (-wide + 4, -10))
    return smooth(skull + line)


def _mohawk(painter: Painter, person: Person, head: Head, scene: Scene) -> None:
    wide = head.half_width
    shaved = 0.6 * person.skin + 0.34 * person.hair
    sides = smooth(
        ((-wide - 1, -2), (-0.95 * wide, -34), (-0.6 * wide, -62), (0, -70), (0.6 * wide, -62), (0.95 * wide, -34))
        + ((wide + 1, -2), (wide - 6, -16), (0.72 * wide, -42), (0, -52), (-0.72 * wide, -42), (-wide + 6, -16))
    )
    painter.fill(sides, shaved, HAIR, _tint(1.0))
    if scene.hat == "none":
        crest = mirrored(((0, -92), (16, -92), (29, -84), (25, -62), (15, -42), (0, -35)))
        painter.fill(crest, person.hair, HAIR, _tint(1.0))


def _curls(path: tuple[tuple[float, float], ...], size: float, wide: float) -> Points:
    """A bumpy outline along a path of the right half, top to bottom."""
    right = np.array(path) * (wide / 55.5, 1)
    ring = np.concatenate((right, right[:0:-1] * (-1, 1)))
    along = smooth(ring, steps=8)
    centre = np.array((0.0, -8.0))
    outward = along - centre
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    bumps = np.abs(np.sin(np.arange(len(along)) * np.pi / 8))[:, None]
    return np.asarray(along + outward * (bumps * 0.55 * size - 0.1 * size))


def _pressed(shape: Points, scene: Scene, wide: float) -> Points:
    """Hair as a hat leaves it: within the hat's dome above its rim."""
    if scene.hat in ("none", "party hat"):  # that one sits on top of the hair
        return shape
    pressed = shape.copy()
    pressed[:, 1] = np.maximum(pressed[:, 1], _PRESSED)
    rise = np.clip((HAT_LINE - pressed[:, 1]) / (HAT_LINE - _PRESSED), 0, 1)
    inside = (wide - 4) * np.sqrt(1 - 0.8 * rise**2)
    above = rise > 0
    pressed[above, 0] = np.clip(pressed[above, 0], -inside[above], inside[above])
    return pressed


def _tint(gain: float):  # type: ignore[no-untyped-def]
    def tint(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
        light = gain * (0.97 + 0.34 * bump(u, v, -18, -62, 46, 13) - 0.0018 * np.clip(v - 10, 0, 90))
        return (light - 0.1 * np.clip(u / 70, 0, 1))[..., None]

    return tint


def _bun_tint(x: float):  # type: ignore[no-untyped-def]
    def tint(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
        return (0.84 + 0.3 * bump(u, v, x - 5, -58, 13, 11))[..., None]

    return tint

"""Hair: a part behind the head and a part in front of it, by style."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.miniature.heads import HAIR, SKIN, Head
from pipeline.miniature.painter import Painter, Plane, Points, Tint, bump, ellipse, mirrored, smooth
from pipeline.miniature.people import Person
from pipeline.miniature.scenes import Scene

# where hats sit: hair above is pressed to the head or hidden
HAT_LINE = -46.0
_PRESSED = -72.0


# for each style the cap's outline as (a, b, y): x is a times half the head's width, plus b
_CAPS: Mapping[str, Sequence[tuple[float, float, float]]] = {
    "short": (
        *((-1, -3, 4), (-1, -5, -30), (-0.8, 0, -70), (-0.2, 0, -86), (0.5, 0, -82), (0.9, 0, -60)),
        *((1, 5, -28), (1, 3, 4), (1, -6, -14), (0.8, 0, -36), (0.2, 0, -38), (-0.35, 0, -50), (-0.8, 0, -34)),
        (-1, 6, -14),
    ),
    "long": (
        *((-1, -10, 0), (-1, -10, -32), (-0.74, 0, -72), (0, 0, -82), (0.74, 0, -72), (1, 10, -32), (1, 10, 0)),
        *((1, -4, 6), (1, -8, -24), (0.5, 0, -44), (0, 0, -58), (-0.5, 0, -44), (-1, 8, -24), (-1, 4, 6)),
    ),
    "bob": (
        *((-1, -15, 40), (-1, -15, -30), (-0.74, 0, -72), (0, 0, -82), (0.74, 0, -72), (1, 15, -30), (1, 15, 40)),
        *((1, -3, 44), (1, -5, -8), (0.86, 0, -28), (0.4, 0, -30), (0, 0, -31), (-0.4, 0, -30), (-0.86, 0, -28)),
        *((-1, 5, -8), (-1, 3, 44)),
    ),
    "curly": (
        *((-1, -6, 0), (-1, -6, -30), (-0.7, 0, -70), (0, 0, -80), (0.7, 0, -70), (1, 6, -30), (1, 6, 0)),
        *((1, -4, -10), (0.8, 0, -36), (0.5, 0, -32), (0.2, 0, -42), (-0.15, 0, -34), (-0.5, 0, -42)),
        *((-0.8, 0, -30), (-1, 4, -10)),
    ),
    "afro": (
        *((-1, -2, 0), (-1, -2, -30), (-0.7, 0, -70), (0, 0, -80), (0.7, 0, -70), (1, 2, -30), (1, 2, 0)),
        *((1, -4, -10), (0.84, 0, -34), (0.45, 0, -44), (0, 0, -46), (-0.45, 0, -44), (-0.84, 0, -34), (-1, 4, -10)),
    ),
    "buns": (
        *((-1, -3, -2), (-1, -4, -32), (-0.74, 0, -68), (0, 0, -77), (0.74, 0, -68), (1, 4, -32), (1, 3, -2)),
        *((1, -5, -14), (0.72, 0, -40), (0, 0, -50), (-0.72, 0, -40), (-1, 5, -14)),
    ),
}


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
            _pressed(shape, scene, wide), person.hair, HAIR, _tint(0.9 if person.hair_style == "afro" else 0.82)
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
                (
                    (wide - 10, -24),
                    (wide + 11, -30),
                    (wide + 17, 20),
                    (wide + 23, 80),
                    (wide + 20, 118),
                    (wide + 8, 140),
                )
                + ((wide - 8, 132), (wide - 12, 104), (wide - 8, 76), (wide - 3, 30))
            )
            painter.fill(lock * (side, 1), person.hair, HAIR, _tint(1.0))


def _cap(style: str, wide: float) -> Points:
    """The hair on top of the head: round the skull, and back along the hairline."""
    outline = np.array(_CAPS[style], np.float64)
    return smooth(np.stack((outline[:, 0] * wide + outline[:, 1], outline[:, 2]), axis=1))


def _mohawk(painter: Painter, person: Person, head: Head, scene: Scene) -> None:
    wide = head.half_width
    shaved = 0.58 * person.skin + 0.36 * person.hair
    sides = smooth(
        ((-wide - 1, -2), (-0.95 * wide, -34), (-0.6 * wide, -62), (0, -70), (0.6 * wide, -62), (0.95 * wide, -34))
        + ((wide + 1, -2), (wide - 6, -16), (0.72 * wide, -42), (0, -52), (-0.72 * wide, -42), (-wide + 6, -16))
    )
    painter.fill(sides, shaved, SKIN, _tint(1.0))
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


def _tint(gain: float) -> Tint:
    def tint(u: Plane, v: Plane) -> Plane:
        light = gain * (0.97 + 0.34 * bump(u, v, -18, -62, 46, 13) - 0.0018 * np.clip(v - 10, 0, 90))
        return np.asarray(light - 0.1 * np.clip(u / 70, 0, 1))[..., None]

    return tint


def _bun_tint(x: float) -> Tint:
    def tint(u: Plane, v: Plane) -> Plane:
        return (0.84 + 0.3 * bump(u, v, x - 5, -58, 13, 11))[..., None]

    return tint

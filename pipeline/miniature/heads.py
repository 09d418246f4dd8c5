"""Heads: neck, ears, face, eyes, brows, nose, mouth, beard, marks, glasses and earrings."""

from dataclasses import dataclass

import numpy as np

from pipeline.miniature.painter import Painter, Plane, Points, bump, ellipse, mirrored, smooth
from pipeline.miniature.people import Person
from pipeline.miniature.scenes import Scene

SKIN, LEFT_BROW, RIGHT_BROW, LEFT_EYE, RIGHT_EYE, GLASSES, LEFT_EAR, RIGHT_EAR, EARRING = range(1, 10)
NOSE, MOUTH, UPPER_LIP, LOWER_LIP, NECK, NECKLACE, CLOTH, HAIR, HAT = range(10, 19)

EYES_TO_MOUTH = 60.0
CHIN = 88.0
FOREHEAD = -50.0  # where the face's box begins
_IRIS = {"brown": (110, 62, 30), "blue": (50, 120, 205), "green": (50, 140, 78), "amber": (196, 132, 30)}
_FRAMES = {"black": (34, 32, 38), "red": (206, 40, 48), "blue": (40, 86, 196)}
_JEWELS = {"gold": (250, 200, 60), "turquoise": (40, 196, 190)}
_NECK_LIGHT = 0.8  # of the skin, where nothing is shaded
_WHITE = np.array((250, 250, 248), np.float64)
_DARK = np.array((40, 28, 30), np.float64)


@dataclass(frozen=True, slots=True)
class Head:
    """A head's measures in the drawing's units, from a person's traits and a scene's expression."""

    half_width: float
    outline: Points  # (n, 2)
    eye_x: float  # of the right eye; the left is its mirror image
    eye_wide: float
    eye_high: float
    nose_wide: float
    nose_y: float
    mouth_wide: float
    mouth_lift: float  # of the corners above the middle
    turn: float  # shift of the features for a turned head

    def landmarks(self) -> Points:
        """Eyes, nose and corners of the mouth (5, 2)."""
        corner = EYES_TO_MOUTH - self.mouth_lift
        eyes, mouth = self.turn, 1.1 * self.turn
        return np.array(
            (
                (eyes - self.eye_x, 0),
                (eyes + self.eye_x, 0),
                (1.8 * self.turn, self.nose_y),
                (mouth - self.mouth_wide, corner),
                (mouth + self.mouth_wide, corner),
            ),
            np.float64,
        )


def head_of(person: Person, scene: Scene) -> Head:
    """The measures of a person's head in a scene."""
    traits, expression = person.traits, scene.expression
    wide = 56.5 + 4.5 * traits["face_width"]
    jaw = wide * (0.79 + 0.1 * traits["jaw"])
    chin = 22 + 6 * traits["jaw"]
    outline = mirrored(
        ((0, -68), (0.58 * wide, -60), (0.92 * wide, -34), (wide, 0), (0.97 * wide, 26), (jaw, 56), (chin, CHIN - 6))
        + ((0, CHIN),)
    )
    opened = {"neutral": 1.0, "smiling": 0.86, "surprised": 1.22, "sad": 0.88}[expression]
    stretched = {"neutral": 1.0, "smiling": 1.16, "surprised": 0.72, "sad": 0.92}[expression]
    lift = {"neutral": 1.5, "smiling": 6.5, "surprised": 0.0, "sad": -6.0}[expression]
    return Head(
        half_width=wide,
        outline=outline,
        eye_x=27.5 + 1.7 * traits["eye_spacing"],
        eye_wide=14 + 1.6 * traits["eye_size"],
        eye_high=(9.9 + 2.2 * traits["eye_size"]) * opened,
        nose_wide=11 + 3.5 * traits["nose_size"],
        nose_y=31 + 1.5 * traits["nose_size"],
        mouth_wide=(22 + 4 * traits["mouth_width"]) * stretched,
        mouth_lift=lift,
        turn=3.0 * scene.turn,
    )


def draw_neck(painter: Painter, person: Person, head: Head) -> None:
    """The neck, darker below the chin."""
    wide = 0.46 * head.half_width
    neck = np.array(
        ((-wide, 40), (wide, 40), (wide + 2, 96), (wide + 16, 118), (0, 150), (-wide - 16, 118), (-wide - 2, 96))
    )

    def tint(u: Plane, v: Plane) -> Plane:
        return ((0.94 - 0.26 * bump(u, v, 0, CHIN - 4, 60, 20)) / _NECK_LIGHT)[..., None]

    painter.fill(neck, person.skin * _NECK_LIGHT, NECK, tint)


def draw_face(painter: Painter, person: Person, head: Head, covered: bool) -> None:
    """Ears and face; `covered`: hair or a hat throws a shadow on the forehead."""
    skin = person.skin.astype(np.float64)
    for side, label in ((-1, LEFT_EAR), (1, RIGHT_EAR)):
        x = side * head.half_width - 0.8 * head.turn
        painter.fill(ellipse(x, 6, 10, 15.5, -8 * side), skin * 0.93, label)
        painter.fill(ellipse(x + side * 1.5, 6, 5, 9, -8 * side), skin * 0.78, line=False)

    def tint(u: Plane, v: Plane) -> Plane:
        light = 1.02 + 0.07 * bump(u, v, -14 + head.turn, -22, 44, 34) - 0.13 * ((u + 8) / 62) ** 2
        light -= 0.1 * bump(u, v, 0, CHIN + 6, 70, 20)
        if covered:
            light -= 0.16 * bump(u, v, 0, -54, 80, 17)
        x, y = 1.8 * head.turn, head.nose_y
        light += 0.1 * bump(u, v, x - 2, y - 2, 0.6 * head.nose_wide, 9) + 0.05 * bump(u, v, x - 2, 8, 5, 16)
        light -= 0.1 * bump(u, v, x + head.nose_wide, y - 3, 7, 16)
        if person.hair_style == "bald" and not covered:
            light += 0.12 * bump(u, v, -20, -50, 18, 10)
        blush = bump(u, v, head.turn - 33, 32, 15, 11) + bump(u, v, head.turn + 33, 32, 15, 11)
        return light[..., None] * (1.0 - blush[..., None] * np.array((-0.02, 0.13, 0.09), np.float32))

    painter.fill(head.outline, skin, SKIN, tint)


def draw_features(painter: Painter, person: Person, head: Head, scene: Scene) -> None:
    """What lies on the face, beard and marks among it."""
    _marks(painter, person, head)
    _beard(painter, person, head)
    _nose(painter, person, head)
    _mouth(painter, person, head, scene.expression)
    for side in (-1, 1):
        _eye(painter, person, head, scene.expression, side)
        _brow(painter, person, head, scene.expression, side)


def draw_glasses(painter: Painter, person: Person, head: Head) -> None:
    """Thick frames, their bridge and temples."""
    if person.glasses == "none":
        return
    shape, colour = person.glasses.split()
    rgb = np.array(_FRAMES[colour], np.float64)
    for side in (-1, 1):
        x = side * head.eye_x + head.turn
        inner, outer = (x - side * 20, x + side * 20)
        painter.stroke(np.array(((outer, -3), (side * head.half_width, -4))), 4, rgb, GLASSES)
        painter.stroke(np.array(((inner, -3), (head.turn, -5))), 4.5, rgb, GLASSES)
        ring = ellipse(x, 1, 20, 20) if shape == "round" else _rounded(x, 1, 21, 16.5)
        painter.stroke(np.concatenate((ring, ring[:1])), 4.6, rgb, GLASSES)


def draw_earrings(painter: Painter, person: Person, head: Head) -> None:
    """A large bead below each ear."""
    if person.earrings != "none":
        rgb = np.array(_JEWELS[person.earrings], np.float64)
        for side in (-1, 1):
            x = side * (head.half_width + 1) - 0.8 * head.turn
            painter.fill(ellipse(x, 28, 6.5, 7.5), rgb, EARRING)
            painter.fill(ellipse(x - 2, 26, 2, 2.2), rgb * 0.4 + 150, line=False)


def _eye(painter: Painter, person: Person, head: Head, expression: str, side: int) -> None:
    x, wide, high = side * head.eye_x + head.turn, head.eye_wide, head.eye_high
    droop = 2.5 if expression == "sad" else 0.0
    rim = np.array(
        ((-wide, 1.0), (-0.5 * wide, -0.82 * high), (0.1 * wide, -high), (0.62 * wide, -0.72 * high + droop))
        + ((wide, droop - 0.5), (0.55 * wide, 0.66 * high), (0, 0.86 * high), (-0.6 * wide, 0.62 * high))
    ) * (side, 1)
    white = smooth(rim + (x, 0))
    painter.fill(white, _WHITE, LEFT_EYE if side < 0 else RIGHT_EYE, line=False)
    radius = 0.95 * (9.4 + 1.3 * person.traits["eye_size"])
    iris = ellipse(x, 0, radius, radius)
    iris[:, 1] = np.clip(iris[:, 1], -0.9 * high, 0.8 * high)
    painter.fill(iris, _IRIS[person.eye_colour], line=False)
    pupil = ellipse(x, 0, 0.48 * radius, 0.48 * radius)
    painter.fill(pupil, _DARK * 0.6, line=False)
    painter.fill(ellipse(x - 2.8, -3, 2.5, 2.5), (255, 255, 255), line=False)
    lid = smooth(rim[:5] + (x, 0), closed=False)
    painter.stroke(lid, 2.8, 0.25 * person.skin + 0.5 * _DARK)


def _brow(painter: Painter, person: Person, head: Head, expression: str, side: int) -> None:
    raised = {"neutral": 0.0, "smiling": 1.5, "surprised": 7.0, "sad": 1.0}[expression]
    inner, outer = {"sad": (-5.5, 4.0), "surprised": (0.5, 1.5)}.get(expression, (1.5, 0.5))
    thick = 3.1 + 1.7 * person.traits["brow_weight"]
    y = -19.5 - 0.5 * head.eye_high - raised + 4
    spine = smooth(((-15, inner), (-3, -3.2), (8, -2.5), (17, outer + 2.5)), closed=False, steps=4)
    taper = np.interp(spine[:, 0], (-15, -10, 4, 17), (0.8, 1, 0.9, 0.35))[:, None] * (0, thick)
    shape = np.concatenate((spine - taper, (spine + taper)[::-1])) * (side, 1) + (side * head.eye_x + head.turn, y)
    painter.fill(shape, 0.82 * person.hair, LEFT_BROW if side < 0 else RIGHT_BROW, line=False)


def _nose(painter: Painter, person: Person, head: Head) -> None:
    x, wide, y = 1.8 * head.turn, head.nose_wide, head.nose_y
    painter.mark(mirrored(((0, -4), (5, 0), (wide, y), (0.7 * wide, y + 7), (0, y + 9))) + (x, 0), NOSE)
    half = ((wide, y - 2), (wide + 0.5, y + 4), (0.6 * wide, y + 6), (0.3 * wide, y + 7.5), (0, y + 8.5))
    wings = smooth([(-u, v) for u, v in half[:-1]] + list(half[::-1]), closed=False) + (x, 0)
    painter.stroke(wings, 2.6, person.skin * (0.7, 0.61, 0.58))


def _mouth(painter: Painter, person: Person, head: Head, expression: str) -> None:
    x, y, wide, lift = 1.1 * head.turn, EYES_TO_MOUTH, head.mouth_wide, head.mouth_lift
    red = (person.traits["lip_colour"] + 1) / 2
    lip = (1 - red) * person.skin * (0.84, 0.66, 0.64) + red * (0.25 * person.skin + np.array((145, 22, 36)))
    left, right = (x - wide, y - lift), (x + wide, y - lift)
    if expression == "surprised":
        painter.fill(ellipse(x, y + 3, wide + 1, 14), lip, LOWER_LIP)
        painter.fill(ellipse(x, y + 3, wide - 4, 9.5), (92, 26, 34), MOUTH, line=False)
        painter.fill(ellipse(x, y + 8, 0.5 * wide, 4), (196, 84, 88), line=False)
        return
    top = y - 0.2 * lift
    upper = smooth((left, (x - 0.4 * wide, top - 5.5), (x, top - 3.8), (x + 0.4 * wide, top - 5.5), right), False)
    middle = smooth(
        (right, (x + 0.5 * wide, y + 0.35 * lift), (x, y + 0.5 * lift), (x - 0.5 * wide, y + 0.35 * lift), left), False
    )
    if expression == "smiling":
        lower = smooth((right, (x + 0.55 * wide, y + 8.5), (x, y + 12.5), (x - 0.55 * wide, y + 8.5), left), False)
        gap = smooth((right, (x + 0.5 * wide, y + 5), (x, y + 8), (x - 0.5 * wide, y + 5), left), False)
        inner = smooth((left, (x - 0.45 * wide, top - 1.5), (x, top), (x + 0.45 * wide, top - 1.5), right), False)
        painter.fill(np.concatenate((upper, lower)), lip, LOWER_LIP)
        painter.fill(np.concatenate((upper, middle)), lip, UPPER_LIP, line=False)
        painter.fill(np.concatenate((inner, gap)), (252, 250, 246), MOUTH, line=False)
        return
    depth = 7.5 if expression == "neutral" else 6.0
    lower = smooth(
        (right, (x + 0.45 * wide, y + depth - 1), (x, y + depth), (x - 0.45 * wide, y + depth - 1), left), False
    )
    painter.fill(np.concatenate((upper, lower)), np.minimum(lip * 1.06, 255), LOWER_LIP)
    painter.fill(np.concatenate((upper, middle)), lip * 0.92, UPPER_LIP, line=False)
    painter.stroke(middle, 2.2, lip * 0.5)


def _beard(painter: Painter, person: Person, head: Head) -> None:
    kind, x = person.beard, 1.1 * head.turn
    colour = 0.9 * person.hair.astype(np.float64)
    wide = head.half_width
    if kind in ("stubble", "full"):
        grown = 9.0 if kind == "full" else 0.0
        jaw = head.outline[(head.outline[:, 1] > 14)]
        jaw = jaw * (1 + 0.035 * (grown > 0), 1) + np.stack(
            (np.zeros(len(jaw)), grown * np.clip((jaw[:, 1] - 30) / 58, 0, 1)), axis=1
        )
        inside = smooth(
            ((-0.95 * wide, 14), (-0.78 * wide, 30), (-0.55 * wide, 46), (x - 12, 43), (x, 42), (x + 12, 43))
            + ((0.55 * wide, 46), (0.78 * wide, 30), (0.95 * wide, 14)),
            closed=False,
        )
        shown = colour if kind == "full" else 0.68 * person.skin + 0.26 * colour
        painter.fill(np.concatenate((jaw, inside)), shown, SKIN)
    if kind in ("moustache", "goatee", "full"):
        shape = ((0, 40), (12, 42), (25, 54), (27, 58), (12, 54), (0, 52))
        if kind != "goatee":
            painter.fill(mirrored(shape) + (x, 0), colour * 0.92, line=False)
    if kind == "goatee":
        painter.fill(mirrored(((0, 70), (13, 72), (17, 82), (10, 97), (0, 101))) + (0.6 * x, 0), colour, SKIN)


def _marks(painter: Painter, person: Person, head: Head) -> None:
    skin = person.skin.astype(np.float64)
    if person.mark == "freckles":
        for side in (-1, 1):
            for u, v in ((24, 20), (32, 23), (40, 19), (28, 30), (36, 32)):
                painter.fill(
                    ellipse(side * u + head.turn, v, 2.3, 2.1, corners=12), skin * (0.74, 0.6, 0.54), line=False
                )
    elif person.mark.startswith("mole"):
        side = -1 if person.mark.endswith("left") else 1
        painter.fill(ellipse(side * 33 + head.turn, 42, 4, 4, corners=16), skin * 0.35, line=False)


def _rounded(x: float, y: float, wide: float, high: float) -> Points:
    """A rectangle with round corners, by its centre and half sides."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.stack(
        (x + wide * np.sign(cosine) * np.abs(cosine) ** 0.4, y + high * np.sign(sine) * np.abs(sine) ** 0.4), axis=1
    )

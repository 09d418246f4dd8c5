"""A drawn world of people: a person in a scene -> a picture, with the truth about its face."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.miniature import hair, heads, wardrobe
from pipeline.miniature.backdrop import backdrop
from pipeline.miniature.painter import OVERSAMPLING, Painter
from pipeline.miniature.people import Person
from pipeline.miniature.scenes import Scene

SIDE = 256  # pixels; the drawing's own units
EYES_Y = 112.0  # of the middle between the eyes, at scale 1
_CENTRE_Y = 128.0  # the head grows and tilts about the picture's middle
_LIGHTS = {"soft": (1.0, 1.0, 1.0), "warm": (1.04, 0.97, 0.82), "dim": (0.8, 0.82, 0.9)}
_DIM_BACKDROP = 0.7  # so that a dim picture is told by what is behind, and skin keeps its colour


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A picture and the truth about it; positions in pixels, the first pixel's centre at 0, 0."""

    pixels: NDArray[np.uint8]  # (S, S, 3) RGB
    box: NDArray[np.float32]  # (4,) left, top, right, bottom of the face, from forehead to chin
    landmarks: NDArray[np.float32]  # (5, 2) left and right eye, nose, left and right of the mouth, as seen
    labels: NDArray[np.uint8]  # (S, S) in BiSeNet's numbers


def draw(person: Person, scene: Scene, size: int = SIDE) -> Drawing:
    """Draw a person in a scene, size pixels square; the same arguments give the same pixels."""
    head = heads.head_of(person, scene)
    behind = backdrop(scene.background, size * OVERSAMPLING, _DIM_BACKDROP if scene.light == "dim" else 1.0)
    painter = Painter(behind, _frame(scene, size), scene.style == "poster", scene.style == "sketch")
    hair.draw_back(painter, person, head, scene)
    heads.draw_neck(painter, person, head)
    wardrobe.draw_clothes(painter, scene.clothes)
    covered = person.hair_style != "bald" or scene.hat != "none"
    heads.draw_face(painter, person, head, covered)
    heads.draw_features(painter, person, head, scene)
    hair.draw_front(painter, person, head, scene)
    heads.draw_glasses(painter, person, head)
    heads.draw_earrings(painter, person, head)
    wardrobe.draw_hat(painter, scene.hat, head)
    face = painter.pixels_of(head.outline[head.outline[:, 1] >= heads.FOREHEAD])
    return Drawing(
        pixels=_lit(painter.picture(), scene),
        box=np.concatenate((face.min(axis=0), face.max(axis=0))).astype(np.float32),
        landmarks=painter.pixels_of(head.landmarks()).astype(np.float32),
        labels=painter.labels,
    )


def _frame(scene: Scene, size: int) -> NDArray[np.float64]:
    """From the drawing's units to pixels (2, 3)."""
    angle, zoom = np.radians(scene.tilt), scene.scale * size / SIDE
    turn = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle)))) * zoom
    middle = np.array((0.5 + scene.x, _CENTRE_Y / SIDE + scene.y)) * size - 0.5
    return np.hstack((turn, (middle + turn @ (0.0, EYES_Y - _CENTRE_Y))[:, None]))


def _lit(pixels: NDArray[np.uint8], scene: Scene) -> NDArray[np.uint8]:
    """The picture in its light and style: a curve for each channel."""
    curve = np.arange(256, dtype=np.float64)[:, None]
    if scene.style == "poster":
        curve = 128 + 1.06 * (curve - 128)
    elif scene.style == "sketch":
        curve = 0.93 * curve + 0.07 * 250
    curve = curve * np.array(_LIGHTS[scene.light])
    table = np.clip(np.round(curve), 0, 255).astype(np.uint8)[None]  # (1, 256, 3)
    return np.asarray(cv2.LUT(pixels, table), np.uint8)

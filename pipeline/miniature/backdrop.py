"""Backgrounds: large soft areas of colour and a few simple shapes, drawn once per size and kept."""

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_SIDE = 256  # the shapes below are in pixels of this side
_PLAIN = {"plain grey": (168, 170, 174), "plain blue": (74, 132, 214), "plain red": (208, 62, 60)}


@lru_cache(maxsize=64)
def backdrop(name: str, side: int, light: float = 1.0) -> NDArray[np.uint8]:
    """A background (side, side, 3), read only; light is what its colours are multiplied by."""
    picture = _PAINTERS[name]() if name in _PAINTERS else _plain(_PLAIN[name])
    picture = cv2.GaussianBlur(
        cv2.convertScaleAbs(picture, alpha=light), (0, 0), 2.2
    )  # out of focus, as behind a portrait
    sized: NDArray[np.uint8] = np.asarray(cv2.resize(picture, (side, side)), np.uint8)
    sized.flags.writeable = False
    return sized


def _gradient(*stops: tuple[float, tuple[int, int, int]]) -> NDArray[Any]:
    """Rows whose colours run through stops (y, colour)."""
    places = [place for place, _ in stops]
    columns = [np.interp(np.arange(_SIDE), places, [rgb[i] for _, rgb in stops]) for i in range(3)]
    return np.ascontiguousarray(np.broadcast_to(np.stack(columns, 1)[:, None], (_SIDE, _SIDE, 3)).astype(np.uint8))


def _disc(picture: NDArray[Any], x: int, y: int, radius: int, colour: tuple[int, int, int]) -> None:
    cv2.circle(picture, (x, y), radius, colour, -1, cv2.LINE_AA)


def _box(picture: NDArray[Any], left: int, top: int, right: int, bottom: int, colour: tuple[int, int, int]) -> None:
    cv2.rectangle(picture, (left, top), (right, bottom), colour, -1)


def _plain(colour: tuple[int, int, int]) -> NDArray[Any]:
    y, x = np.mgrid[:_SIDE, :_SIDE]
    light = 1.12 - 0.3 * np.hypot((x - 110) / _SIDE, (y - 90) / _SIDE)
    return np.asarray(np.clip(light[..., None] * np.array(colour), 0, 255), np.uint8)


def _garden() -> NDArray[Any]:
    picture = _gradient((0, (176, 220, 244)), (90, (214, 236, 220)), (130, (120, 190, 90)), (256, (74, 150, 62)))
    for x, y, r in ((-4, 60, 52), (44, 96, 34), (262, 66, 54), (214, 104, 30)):
        _disc(picture, x, y, r, (58, 132, 62))
        _disc(picture, x - 8, y - 10, r - 16, (84, 158, 76))
    for x, y, colour in ((18, 168, (240, 80, 110)), (44, 204, (255, 214, 70)), (238, 176, (240, 80, 110))):
        _disc(picture, x, y, 10, colour)
    _disc(picture, 212, 206, 10, (255, 255, 255))
    _disc(picture, 20, 232, 10, (255, 255, 255))
    return picture


def _beach() -> NDArray[Any]:
    picture = _gradient((0, (92, 186, 236)), (104, (190, 230, 244)), (105, (32, 150, 186)), (164, (70, 196, 204)))
    _box(picture, 0, 165, 256, 256, (240, 214, 154))
    _box(picture, 0, 160, 256, 167, (250, 250, 246))
    _disc(picture, 222, 36, 22, (255, 244, 170))
    cv2.fillPoly(picture, [np.array(((26, 62), (26, 118), (2, 118)))], (255, 255, 255), cv2.LINE_AA)
    return picture


def _night_city() -> NDArray[Any]:
    picture = _gradient((0, (18, 22, 62)), (256, (62, 44, 104)))
    _disc(picture, 216, 34, 16, (250, 240, 200))
    for left, top, right in ((-18, 84, 36), (40, 122, 80), (176, 110, 216), (220, 66, 274), (84, 150, 172)):
        _box(picture, left, top, right, 256, (22, 20, 44))
        for y in range(top + 14, 240, 32):
            for x in range(left + 8, right - 12, 24):
                _box(picture, x, y, x + 12, y + 15, (250, 204, 96))
    return picture


def _snow() -> NDArray[Any]:
    picture = _gradient((0, (160, 190, 216)), (150, (214, 226, 238)), (256, (228, 236, 244)))
    for x, y in ((30, 70), (226, 56), (70, 120), (190, 116)):
        for step in range(3):
            top, wide = y + 24 * step, 15 + 9 * step
            corners = np.array(((x, top - 10), (x - wide, top + 30), (x + wide, top + 30)))
            cv2.fillPoly(picture, [corners], (84, 122, 124), cv2.LINE_AA)
            cap = np.array(((x, top - 10), (x - wide // 2, top + 8), (x + wide // 2, top + 8)))
            cv2.fillPoly(picture, [cap], (250, 252, 255), cv2.LINE_AA)
    _disc(picture, 40, 380, 210, (246, 250, 254))
    _disc(picture, 220, 390, 210, (240, 246, 252))
    return picture


def _sunset() -> NDArray[Any]:
    picture = _gradient((0, (110, 60, 140)), (70, (220, 90, 120)), (130, (255, 160, 80)), (178, (255, 214, 120)))
    _disc(picture, 206, 160, 40, (255, 240, 170))
    _disc(picture, 30, 330, 160, (94, 44, 84))
    _disc(picture, 214, 350, 160, (72, 34, 74))
    return picture


def _space() -> NDArray[Any]:
    picture = _gradient((0, (14, 12, 34)), (256, (34, 18, 62)))
    _disc(picture, 30, 60, 40, (226, 140, 74))
    cv2.ellipse(picture, (30, 60), (62, 14), -18, 0, 360, (240, 206, 160), 5, cv2.LINE_AA)
    _disc(picture, 234, 170, 30, (70, 180, 190))
    for x, y in ((110, 18), (150, 40), (216, 30), (240, 84), (14, 130), (44, 170), (200, 110), (18, 216), (76, 26)):
        _disc(picture, x, y, 3, (255, 255, 240))
    return picture


def _room() -> NDArray[Any]:
    picture = _gradient((0, (236, 214, 184)), (196, (226, 200, 166)), (197, (150, 98, 62)), (256, (128, 82, 52)))
    _box(picture, 8, 34, 78, 128, (250, 250, 246))
    _box(picture, 15, 41, 71, 121, (150, 206, 240))
    _box(picture, 40, 34, 46, 128, (250, 250, 246))
    _box(picture, 8, 78, 78, 84, (250, 250, 246))
    _box(picture, 196, 120, 262, 126, (128, 82, 52))
    for x, top, colour in ((202, 84, (190, 60, 60)), (218, 76, (50, 110, 150)), (234, 88, (230, 170, 60))):
        _box(picture, x, top, x + 13, 120, colour)
    _box(picture, 196, 186, 262, 192, (128, 82, 52))
    _disc(picture, 226, 168, 18, (90, 150, 84))
    return picture


_PAINTERS = {
    "garden": _garden,
    "beach": _beach,
    "night city": _night_city,
    "snow": _snow,
    "sunset": _sunset,
    "space": _space,
    "room": _room,
}

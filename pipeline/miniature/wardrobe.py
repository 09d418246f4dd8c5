"""Hats and clothes."""

import numpy as np

from pipeline.miniature.heads import CLOTH, HAT, Head
from pipeline.miniature.painter import Painter, Plane, Points, bump, ellipse, mirrored, smooth

_WHITE = np.array((246, 246, 244), np.float64)
_BLUE = np.array((40, 74, 150), np.float64)
_CLOTHES = {
    "white shirt": np.array((244, 244, 246), np.float64),
    "yellow shirt": np.array((250, 204, 40), np.float64),
    "striped shirt": np.array((240, 242, 246), np.float64),
    "black suit": np.array((46, 46, 56), np.float64),
    "green hoodie": np.array((46, 140, 84), np.float64),
    "pink sweater": np.array((244, 150, 180), np.float64),
}


def draw_clothes(painter: Painter, clothes: str) -> None:
    """The shoulders in their clothes."""
    body = mirrored(((0, 106), (24, 102), (62, 112), (100, 126), (124, 160), (130, 230), (0, 240)))
    if clothes == "green hoodie":
        _hood(painter)
    painter.fill(body, _CLOTHES[clothes], CLOTH, _cloth_tint)
    {
        "white shirt": _collar,
        "yellow shirt": _round_neck,
        "striped shirt": _stripes,
        "black suit": _suit,
        "green hoodie": _strings,
        "pink sweater": _turtleneck,
    }[clothes](painter)


def draw_hat(painter: Painter, hat: str, head: Head) -> None:
    """One of the hats, or none."""
    drawers = {"red beanie": _beanie, "blue cap": _cap, "straw hat": _straw, "party hat": _cone, "top hat": _top_hat}
    if hat != "none":
        drawers[hat](painter, head.half_width)


def _cloth_tint(u: Plane, v: Plane) -> Plane:
    return np.asarray(
        1.0 - 0.2 * bump(u, v, 0, 104, 44, 16) - 0.14 * np.clip((u - 20) / 110, 0, 1) - 0.06 * (np.abs(u) > 95)
    )[..., None]


def _round_tint(u: Plane, v: Plane) -> Plane:
    return np.asarray(0.94 + 0.22 * bump(u, v, -20, -66, 26, 24) - 0.22 * np.clip((u - 6) / 60, 0, 1))[..., None]


def _collar(painter: Painter) -> None:
    for side in (-1, 1):
        flap = np.array(((3, 122), (27, 96), (37, 108), (20, 138))) * (side, 1)
        painter.fill(flap, (226, 228, 236), CLOTH)
    painter.stroke(np.array(((0, 126), (0, 240))), 2, (205, 208, 218))


def _round_neck(painter: Painter) -> None:
    painter.stroke(
        smooth(((-29, 101), (-16, 112), (0, 116), (16, 112), (29, 101)), False),
        7,
        _CLOTHES["yellow shirt"] * (0.94, 0.8, 0.6),
        CLOTH,
    )


def _stripes(painter: Painter) -> None:
    for y, reach in ((126, 88), (148, 110), (170, 120), (192, 124)):
        band = smooth(((-reach, y + 6), (-0.5 * reach, y - 1), (0, y), (0.5 * reach, y - 1), (reach, y + 6)), False)
        painter.fill(np.concatenate((band, (band + (0, 11))[::-1])), _BLUE, line=False)
    painter.stroke(smooth(((-29, 101), (-16, 112), (0, 116), (16, 112), (29, 101)), False), 6, _BLUE, CLOTH)


def _suit(painter: Painter) -> None:
    painter.fill(np.array(((-26, 100), (26, 100), (0, 190))), _WHITE, CLOTH, line=False)
    painter.fill(np.array(((-6, 116), (6, 116), (9, 170), (0, 190), (-9, 170))), (190, 36, 46), CLOTH)
    painter.fill(np.array(((-8, 108), (8, 108), (5, 120), (-5, 120))), (160, 28, 40), CLOTH)
    for side in (-1, 1):
        lapel = np.array(((24, 98), (40, 106), (46, 134), (34, 138), (0, 200))) * (side, 1)
        painter.fill(lapel, _CLOTHES["black suit"] * 1.35, CLOTH)


def _hood(painter: Painter) -> None:
    painter.fill(ellipse(0, 100, 62, 24), _CLOTHES["green hoodie"] * 0.72, CLOTH)


def _strings(painter: Painter) -> None:
    painter.stroke(
        smooth(((-44, 96), (-26, 112), (0, 120), (26, 112), (44, 96)), False),
        13,
        _CLOTHES["green hoodie"] * 0.86,
        CLOTH,
    )
    for side in (-1, 1):
        painter.stroke(np.array(((side * 14, 120), (side * 16, 150))), 4, _WHITE)


def _turtleneck(painter: Painter) -> None:
    roll = smooth(((-30, 92), (0, 98), (30, 92), (34, 108), (20, 116), (0, 119), (-20, 116), (-34, 108)))
    painter.fill(roll, _CLOTHES["pink sweater"] * 0.9, CLOTH)


def _dome(wide: float, bottom: float, top: float) -> Points:
    return mirrored(
        (
            (0, top),
            (0.55 * wide, top + 5),
            (0.9 * wide, top + 24),
            (wide, bottom - 4),
            (0.6 * wide, bottom + 1),
            (0, bottom + 3),
        )
    )


def _beanie(painter: Painter, wide: float) -> None:
    red = np.array((214, 44, 48), np.float64)
    painter.fill(ellipse(0, -82, 12, 10), (250, 240, 232), HAT)
    painter.fill(_dome(wide + 4, -34, -80), red, HAT, _round_tint)
    w = wide + 4
    band = ((0, -46), (0.8 * w, -49), (w + 1, -47), (w + 3, -38), (w + 1, -29), (0.8 * w, -29), (0, -27))
    painter.fill(mirrored(band), red * 0.76, HAT, _band_tint)


def _band_tint(u: Plane, _: Plane) -> Plane:
    return np.asarray(1.05 - 0.0035 * np.clip(u + 20, 0, 90))[..., None]


def _cap(painter: Painter, wide: float) -> None:
    blue = np.array((38, 92, 204), np.float64)
    painter.fill(_dome(wide + 3, -36, -84), blue, HAT, _round_tint)
    painter.fill(ellipse(0, -62, 12, 12), _WHITE, HAT, line=False)
    w = wide
    visor = smooth(
        ((-w, -42), (0, -46), (w, -42), (w + 6, -32), (0.6 * w, -30), (0, -33), (-0.6 * w, -30), (-w - 6, -32))
    )
    painter.fill(visor, blue * 0.62, HAT)


def _straw(painter: Painter, wide: float) -> None:
    straw = np.array((240, 204, 110), np.float64)
    painter.fill(ellipse(0, -41, wide + 34, 11), straw * 0.86, HAT)
    painter.fill(_dome(wide - 4, -46, -88), straw, HAT, _round_tint)
    w = wide - 3
    band = smooth(((-w, -58), (0, -54), (w, -58), (w + 1, -47), (0, -42), (-w - 1, -47)))
    painter.fill(band, (150, 66, 40), HAT)


def _cone(painter: Painter, wide: float) -> None:
    green = np.array((40, 170, 80), np.float64)
    cone = np.array(((0, -90), (0.7, -44), (0.35, -38), (0, -36), (-0.35, -38), (-0.7, -44)), np.float64) * (wide, 1)
    painter.fill(cone, green, HAT, _round_tint)
    for x, y in ((-12, -52), (12, -50), (0, -68)):
        painter.fill(ellipse(x, y, 4.5, 4.5), (255, 226, 70), HAT, line=False)
    painter.fill(ellipse(0, -85, 8, 7), (255, 226, 70), HAT)


def _top_hat(painter: Painter, wide: float) -> None:
    black = np.array((44, 42, 54), np.float64)
    w = wide - 6
    crown = smooth(
        ((-w - 2, -90), (0, -92), (w + 2, -90), (w - 2, -66), (w - 3, -42), (0, -38), (-w + 3, -42), (-w + 2, -66)),
        steps=4,
    )
    painter.fill(crown, black, HAT, lambda u, v: 1 + 0.5 * bump(u, v, -22, -70, 12, 30)[..., None])
    band = smooth(((-w + 2, -58), (0, -55), (w - 2, -58), (w - 2, -45), (0, -41), (-w + 2, -45)))
    painter.fill(band, (176, 40, 60), HAT)
    painter.fill(ellipse(0, -40, wide + 20, 8), black * 0.8, HAT)

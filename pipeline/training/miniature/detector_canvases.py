"""Small gray pictures with faces in them, made on the fly, for the miniature's detector to learn from.

A real patch is pasted at random place, scale and tilt, also into the heads of drawn people, so that it has hair, neck
and shoulders around it. Whatever could give a paste away (edges, blur) is pasted without faces as well.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import cv2
import numpy as np

from pipeline.training.miniature.detector_data import (
    EDGE,
    LARGEST,
    LFW_BOX,
    LFW_POINTS,
    SMALLEST,
    Gray,
    Placed,
    Portrait,
    Sources,
    centred,
    inside,
    level,
    mirrored,
    place,
    warp,
)
from pipeline.training.miniature.detector_patches import lit, mixed, oval, ramp, shuffled, turned

Choice = TypeVar("Choice")


class Canvases:
    """Draws canvases from its sources, the same ones for the same generator.

    hard: heads tilt and turn further, contrasts are clearer, and empty canvases show badges and lying heads as well.
    """

    def __init__(self, sources: Sources, rng: np.random.Generator, hard: bool = False) -> None:
        self._sources = sources
        self._rng = rng
        self._hard = hard

    def draw(self) -> tuple[Gray, list[Placed]]:
        """A canvas (EDGE, EDGE), and the faces in it of any size that are upright."""
        rng = self._rng
        canvas = self._background()
        faces: list[Placed] = []
        for _ in range(rng.choice(4, p=(0.3, 0.4, 0.2, 0.1))):
            kind = rng.random()
            if kind < 0.25:
                self._nothing(canvas, faces)
            elif kind < 0.42:
                self._wrong(canvas, faces)
            elif kind < 0.6 and self._sources.drawn:
                self._drawn(canvas, faces)
            elif kind < 0.78 and self._sources.drawn:
                self._exchanged(canvas, faces)
            else:
                self._real(canvas, faces)
        return self._seen(canvas), faces

    def empty(self) -> Gray:
        """A canvas (EDGE, EDGE) without a face, now and then with what could be taken for one."""
        rng = self._rng
        canvas = self._background()
        for _ in range(rng.choice(3, p=(0.5, 0.3, 0.2))):
            (self._wrong if rng.random() < 0.4 else self._nothing)(canvas, [])
        kind = rng.random() if self._hard else 1
        if kind < 0.35:
            self._badge(canvas)
        elif kind < 0.65:
            self._exchanged(canvas, [], rng.uniform(60, 300))
        return self._seen(canvas)

    def _background(self) -> Gray:
        rng = self._rng
        kind = rng.random()
        if kind < 0.6:
            return self._scenery()
        if kind < 0.72:  # two pictures side by side, or one and the black beyond its border
            one, other = self._scenery(), self._scenery() * (rng.random() < 0.5)
            cut = rng.integers(8, EDGE - 8)
            one[:, cut:] = other[:, cut:]
            return one if rng.random() < 0.5 else np.ascontiguousarray(one.T)
        canvas = np.full((EDGE, EDGE), rng.uniform(0, 255), np.float32)
        if kind < 0.8:
            canvas += ramp(rng) * rng.uniform(0, 120)
        elif kind < 0.9:
            for edge in (4, 8, 16, 32, 64):
                noise = rng.normal(0, rng.uniform(0, 40), (edge, edge)).astype(np.float32)
                canvas += cv2.resize(noise, (EDGE, EDGE), interpolation=cv2.INTER_CUBIC)
        for _ in range(rng.integers(12)):
            self._shape(canvas)
        return canvas

    def _shape(self, canvas: Gray) -> None:
        """A polygon, a disc or a line."""
        rng = self._rng
        shade, kind = rng.uniform(0, 255), rng.integers(3)
        centre = rng.integers(0, EDGE, 2)
        if kind == 0:
            corners = (centre + rng.normal(0, rng.uniform(2, 25), (rng.integers(3, 7), 2))).astype(np.int32)
            cv2.fillPoly(canvas, [corners], shade, cv2.LINE_AA)
        elif kind == 1:
            axes = [int(x) for x in rng.uniform(1, rng.uniform(2, 25), 2)]
            cv2.ellipse(canvas, centre.tolist(), axes, rng.uniform(0, 180), 0, 360, shade, -1, cv2.LINE_AA)
        else:
            end = rng.integers(0, EDGE, 2).tolist()
            cv2.line(canvas, centre.tolist(), end, shade, int(rng.integers(1, 5)), cv2.LINE_AA)

    def _crop(self, picture: Gray) -> Gray:
        rng = self._rng
        turn = int(rng.integers(4)) if rng.random() < 0.4 else 0
        squeeze = math.exp(rng.normal(0, 0.2))
        scale = max(math.exp(rng.uniform(math.log(0.6), math.log(1.6))), EDGE / min(picture.shape))
        scales = scale * np.array([max(squeeze, 1), max(1 / squeeze, 1)])
        corner = rng.uniform(0, np.maximum(np.array(picture.shape[::-1]) - EDGE / scales, 0))
        crop = warp(picture, np.column_stack([np.diag(scales), -scales * corner]).astype(np.float32))
        crop = np.rot90(crop[:, ::-1] if rng.random() < 0.5 else crop, turn)
        if rng.random() < 0.15:
            crop = 255 - crop
        return np.ascontiguousarray(crop)

    def _scenery(self) -> Gray:
        """A part of a picture without a face, or of two, one shining through the other."""
        rng, scenery = self._rng, self._sources.scenery
        crop = self._crop(self._one_of(scenery))
        if rng.random() < 0.2:
            crop += rng.uniform(0.2, 0.8) * (self._crop(self._one_of(scenery)) - crop)
        return crop

    def _matrix(self, portrait: Portrait, edge: float, tilt: float) -> Gray:
        """Scales the face to this edge, tilts it by degrees, squeezes it a little, and puts it anywhere."""
        rng = self._rng
        scale, angle = edge / portrait.edge, math.radians(tilt)
        squeeze, shear = math.exp(rng.normal(0, 0.06)), rng.normal(0, 0.05)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        linear = turn @ np.array([[scale * squeeze, scale * shear], [0, scale / squeeze]])
        middle = (portrait.box[:2] + portrait.box[2:]) / 2
        target = rng.uniform(min(0.3 * edge, EDGE / 2), max(EDGE - 0.3 * edge, EDGE / 2), 2)
        return np.column_stack([linear, target - linear @ middle]).astype(np.float32)

    def _edge(self) -> float:
        """A face's edge: mostly one to find, sometimes one too small or too large."""
        rng = self._rng
        kind = rng.random()
        if kind < 0.05:
            return float(rng.uniform(6, SMALLEST))
        if kind < 0.15:
            return float(math.exp(rng.uniform(math.log(LARGEST), math.log(110))))
        return float(math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST))))

    def _one_of(self, choices: Sequence[Choice]) -> Choice:
        return choices[int(self._rng.integers(len(choices)))]

    def _pick(self, portraits: Sequence[Portrait]) -> Portrait:
        portrait = self._one_of(portraits)
        return portrait if self._rng.random() < 0.5 else mirrored(portrait)

    def _face(self) -> Portrait:
        """A real face, often one between two, often turned to one side."""
        rng = self._rng
        portrait = self._pick(self._sources.real)
        if rng.random() < 0.4:
            portrait = mixed(portrait, self._pick(self._sources.real), rng.uniform(0.2, 0.8))
        if rng.random() < 0.6:
            spread = (0.55, 0.25) if self._hard else (0.4, 0.15)
            portrait = turned(portrait, *np.clip(rng.normal(0, spread), (-0.75, -0.3), (0.75, 0.3)).tolist())
        return portrait

    def _tilt(self) -> float:
        spread, most = (18, 38) if self._hard else (12, 32)
        return float(np.clip(self._rng.normal(0, spread), -most, most))

    def _real(self, canvas: Gray, faces: list[Placed]) -> None:
        portrait = self._face()
        matrix = self._matrix(portrait, self._edge(), self._tilt())
        if self._rng.random() < 0.6:
            self._body(canvas, faces, place(portrait, matrix))
        self._paste(canvas, faces, lit(self._rng, portrait.levels[0]), matrix, oval(self._rng, portrait))
        faces.append(place(portrait, matrix))

    def _drawn(self, canvas: Gray, faces: list[Placed]) -> None:
        portrait = self._pick(self._sources.drawn)
        edge = self._edge()
        portrait = level(portrait, edge)
        matrix = self._matrix(portrait, edge, self._rng.normal(0, 6))
        gray = portrait.levels[0]
        self._paste(canvas, faces, gray, matrix, np.ones_like(gray))
        faces.append(place(portrait, matrix))

    def _exchanged(self, canvas: Gray, faces: list[Placed], tilt: float | None = None) -> None:
        """A real face in a drawn head, tilted by these degrees or by a few."""
        rng = self._rng
        real, drawn = self._face(), self._pick(self._sources.drawn)
        edge = self._edge()
        drawn = level(drawn, edge)
        matrix = self._matrix(drawn, edge, self._tilt() if tilt is None else tilt)
        gray = drawn.levels[0]
        self._paste(canvas, faces, gray, matrix, np.ones_like(gray))
        fit, _ = cv2.estimateAffinePartial2D(real.points, drawn.points, method=cv2.LMEDS)
        into = (np.vstack([matrix, (0, 0, 1)]) @ np.vstack([fit, (0, 0, 1)]))[:2].astype(np.float32)
        patch = lit(rng, real.levels[0])
        if rng.random() < 0.7:  # as bright as the drawn face
            left, top, right, bottom = np.clip(drawn.box, 0, gray.shape[0]).astype(int)
            patch = patch + (gray[top:bottom, left:right].mean() - patch.mean())
        self._paste(canvas, faces, patch, into, oval(rng, real))
        faces.append(place(real, into))

    def _body(self, canvas: Gray, faces: list[Placed], face: Placed) -> None:
        """Hair and shoulders, roughly, behind a face to come."""
        rng = self._rng
        cover = np.zeros_like(canvas)
        edges, middle = face.box[2:] - face.box[:2], (face.box[:2] + face.box[2:]) / 2
        shoulders = (0.95, (rng.uniform(0.8, 1.6), rng.uniform(0.3, 0.6)), rng.uniform(0, 255))
        neck = (0.55, (0.3, 0.4), rng.uniform(60, 230))
        hair = (rng.uniform(-0.2, 0.1), rng.uniform(0.5, 0.8, 2), rng.uniform(0, 200))
        for down, axes, shade in (shoulders, neck, hair):
            centre = (middle + (0, down) * edges).astype(int).tolist()
            size = (edges * axes).astype(int).tolist()
            cv2.ellipse(canvas, centre, size, 0, 0, 360, shade, -1, cv2.LINE_AA)
            cv2.ellipse(cover, centre, size, 0, 0, 360, 1.0, -1)
        _hide(faces, cover)

    def _nothing(self, canvas: Gray, faces: list[Placed]) -> None:
        """A patch without a face, pasted as faces are."""
        rng = self._rng
        if rng.random() < 0.5:
            gray = self._one_of(self._sources.patches)
        else:
            scenery = self._scenery()
            left, top = rng.integers(0, EDGE - 25, 2)
            gray = scenery[top : top + 25, left : left + 25]
        portrait = Portrait((gray,), LFW_BOX, LFW_POINTS, drawn=False)
        matrix = self._matrix(portrait, self._edge(), rng.uniform(-180, 180))
        if rng.random() < 0.4:
            self._body(canvas, faces, place(portrait, matrix))
        self._paste(canvas, faces, gray, matrix, oval(rng, portrait))

    def _badge(self, canvas: Gray) -> None:
        """A disc or a label of a face's size with spots and lines, often as symmetric as a face."""
        rng = self._rng
        gray = np.full((EDGE, EDGE), rng.uniform(0, 255), np.float32)
        if rng.random() < 0.5:  # a rim
            cv2.circle(gray, (EDGE // 2, EDGE // 2), int(rng.integers(16, 30)), rng.uniform(0, 255), -1, cv2.LINE_AA)
        for _ in range(rng.integers(2, 9)):
            self._shape(gray)
        if rng.random() < 0.5:
            gray = np.where(np.arange(EDGE) < EDGE / 2, gray, gray[:, ::-1])
        whole = np.array([0, 0, EDGE, EDGE], np.float32)
        badge = Portrait((gray,), whole, LFW_POINTS, drawn=False)
        self._paste(canvas, [], gray, self._matrix(badge, self._edge(), rng.normal(0, 30)), oval(rng, badge))

    def _wrong(self, canvas: Gray, faces: list[Placed]) -> None:
        """A face on its side or its head, or one whose parts lie about."""
        rng = self._rng
        portrait, tilt, edge = self._pick(self._sources.real), self._tilt(), self._edge()
        if self._sources.drawn and rng.random() < 0.4:
            portrait, tilt = level(self._pick(self._sources.drawn), edge), rng.uniform(70, 290)
        elif rng.random() < 0.5:
            tilt = rng.uniform(70, 290)
        else:
            portrait = replace(portrait, levels=(shuffled(rng, portrait.levels[0]),))
        gray = portrait.levels[0]
        mask = np.ones_like(gray) if portrait.drawn else oval(rng, portrait)
        self._paste(canvas, faces, gray, self._matrix(portrait, edge, tilt), mask)

    def _paste(self, canvas: Gray, faces: list[Placed], gray: Gray, matrix: Gray, mask: Gray) -> None:
        alpha = cv2.warpAffine(mask, centred(matrix), (EDGE, EDGE), flags=cv2.INTER_LINEAR)
        canvas += alpha * (warp(gray, matrix) - canvas)
        _hide(faces, alpha)

    def _seen(self, canvas: Gray) -> Gray:
        """The canvas through a camera: blur or sharpening, contrast, noise."""
        rng = self._rng
        kind = rng.random()
        if kind < 0.35:
            canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.1)), np.float32)
        elif kind < 0.65:
            canvas += rng.uniform(0, 1.5) * (canvas - cv2.GaussianBlur(canvas, (0, 0), 1.0))
        if rng.random() < 0.7:
            canvas = (canvas - 128) * rng.uniform(0.7 if self._hard else 0.5, 1.3) + (128 + rng.normal(0, 20))
        canvas = np.clip(canvas, 0, 255)
        if rng.random() < 0.3:
            canvas = np.asarray(255 * (canvas / 255) ** math.exp(rng.normal(0, 0.3)), np.float32)
        if rng.random() < 0.4:
            canvas += rng.normal(0, rng.uniform(0, 8), canvas.shape).astype(np.float32)
        return np.clip(canvas, 0, 255)


def _hide(faces: list[Placed], alpha: Gray) -> None:
    for face in faces:
        left, top, right, bottom = np.clip(face.box, 0, EDGE).astype(int)
        if right > left and bottom > top:
            face.visible = min(face.visible, inside(face.box) * (1 - float(alpha[top:bottom, left:right].mean())))

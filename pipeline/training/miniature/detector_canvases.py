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
    level,
    mirrored,
    place,
    warp,
)

Choice = TypeVar("Choice")


class Canvases:
    """Draws canvases from its sources, the same ones for the same generator."""

    def __init__(self, sources: Sources, rng: np.random.Generator) -> None:
        self._sources = sources
        self._rng = rng

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

    def _background(self) -> Gray:
        rng = self._rng
        kind = rng.random()
        if kind < 0.6:
            return self._scenery()
        if kind < 0.7:  # two pictures side by side
            one, other = self._scenery(), self._scenery()
            cut = rng.integers(8, EDGE - 8)
            one[:, cut:] = other[:, cut:]
            return one if rng.random() < 0.5 else np.ascontiguousarray(one.T)
        canvas = np.full((EDGE, EDGE), rng.uniform(0, 255), np.float32)
        if kind < 0.8:
            canvas += _ramp(rng) * rng.uniform(0, 120)
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
        target = rng.uniform(min(0.2 * edge, EDGE / 2), max(EDGE - 0.2 * edge, EDGE / 2), 2)
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

    def _tilt(self) -> float:
        return float(np.clip(self._rng.normal(0, 12), -32, 32))

    def _real(self, canvas: Gray, faces: list[Placed]) -> None:
        portrait = self._pick(self._sources.real)
        matrix = self._matrix(portrait, self._edge(), self._tilt())
        if self._rng.random() < 0.6:
            self._body(canvas, faces, place(portrait, matrix))
        self._paste(canvas, faces, self._lit(portrait.levels[0]), matrix, _mask(self._rng, portrait))
        faces.append(place(portrait, matrix))

    def _drawn(self, canvas: Gray, faces: list[Placed]) -> None:
        portrait = self._pick(self._sources.drawn)
        edge = self._edge()
        portrait = level(portrait, edge)
        matrix = self._matrix(portrait, edge, self._rng.normal(0, 6))
        gray = portrait.levels[0]
        self._paste(canvas, faces, gray, matrix, np.ones_like(gray))
        faces.append(place(portrait, matrix))

    def _exchanged(self, canvas: Gray, faces: list[Placed]) -> None:
        """A real face in a drawn head."""
        rng = self._rng
        real, drawn = self._pick(self._sources.real), self._pick(self._sources.drawn)
        edge = self._edge()
        drawn = level(drawn, edge)
        matrix = self._matrix(drawn, edge, self._tilt())
        gray = drawn.levels[0]
        self._paste(canvas, faces, gray, matrix, np.ones_like(gray))
        fit, _ = cv2.estimateAffinePartial2D(real.points, drawn.points, method=cv2.LMEDS)
        into = (np.vstack([matrix, (0, 0, 1)]) @ np.vstack([fit, (0, 0, 1)]))[:2].astype(np.float32)
        patch = self._lit(real.levels[0])
        if rng.random() < 0.7:  # as bright as the drawn face
            left, top, right, bottom = np.clip(drawn.box, 0, gray.shape[0]).astype(int)
            patch = patch + (gray[top:bottom, left:right].mean() - patch.mean())
        self._paste(canvas, faces, patch, into, _mask(rng, real))
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
        self._paste(canvas, faces, gray, matrix, _mask(rng, portrait))

    def _wrong(self, canvas: Gray, faces: list[Placed]) -> None:
        """A face on its side or its head, or one whose parts lie about."""
        rng = self._rng
        portrait, tilt, edge = self._pick(self._sources.real), self._tilt(), self._edge()
        if self._sources.drawn and rng.random() < 0.4:
            portrait, tilt = level(self._pick(self._sources.drawn), edge), rng.uniform(70, 290)
        elif rng.random() < 0.5:
            tilt = rng.uniform(70, 290)
        else:
            portrait = replace(portrait, levels=(_shuffled(rng, portrait.levels[0]),))
        gray = portrait.levels[0]
        mask = np.ones_like(gray) if portrait.drawn else _mask(rng, portrait)
        self._paste(canvas, faces, gray, self._matrix(portrait, edge, tilt), mask)

    def _paste(self, canvas: Gray, faces: list[Placed], gray: Gray, matrix: Gray, mask: Gray) -> None:
        alpha = cv2.warpAffine(mask, centred(matrix), (EDGE, EDGE), flags=cv2.INTER_LINEAR)
        canvas += alpha * (warp(gray, matrix) - canvas)
        _hide(faces, alpha)

    def _lit(self, gray: Gray) -> Gray:
        """The same face in other light."""
        rng = self._rng
        contrast, light = rng.uniform(0.5, 1.3), rng.normal(0, 25)
        gray = (gray - gray.mean()) * contrast + gray.mean() + light
        if rng.random() < 0.4:
            ramp = cv2.resize(_ramp(rng), gray.shape[::-1])
            gray = gray * np.exp(ramp * rng.uniform(0, 0.7))
        return gray.astype(np.float32)

    def _seen(self, canvas: Gray) -> Gray:
        """The canvas through a camera: blur or sharpening, contrast, noise."""
        rng = self._rng
        kind = rng.random()
        if kind < 0.35:
            canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.1)), np.float32)
        elif kind < 0.65:
            canvas += rng.uniform(0, 1.5) * (canvas - cv2.GaussianBlur(canvas, (0, 0), 1.0))
        if rng.random() < 0.7:
            canvas = (canvas - 128) * rng.uniform(0.5, 1.3) + (128 + rng.normal(0, 20))
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
            face.visible = min(face.visible, 1 - float(alpha[top:bottom, left:right].mean()))


def _ramp(rng: np.random.Generator) -> Gray:
    """Light from a random side, -1..1, (EDGE, EDGE)."""
    across, down = np.meshgrid(*[np.linspace(-1, 1, EDGE, dtype=np.float32)] * 2)
    angle = rng.uniform(0, 2 * math.pi)
    return np.asarray(across * math.cos(angle) + down * math.sin(angle), np.float32)


def _mask(rng: np.random.Generator, portrait: Portrait) -> Gray:
    """What of a tight patch to paste: the whole, or an oval, with soft edges (25, 25)."""
    height, width = portrait.levels[0].shape
    mask = np.ones((height, width), np.float32)
    if rng.random() < 0.8:
        left, top, right, bottom = portrait.box
        across = (np.arange(width) + 0.5 - (left + right) / 2) / ((right - left) / 2)
        down = (np.arange(height) + 0.5 - (top + bottom) / 2) / ((bottom - top) / 2)
        power, reach = rng.uniform(2, 5), rng.uniform(0.85, 1.15)
        distance = (np.abs(across) ** power + np.abs(down)[:, None] ** power) ** (1 / power)
        mask = np.clip((reach - distance) / rng.uniform(0.05, 0.3) + 0.5, 0, 1).astype(np.float32)
    mask[[0, -1]] *= 0.5
    mask[:, [0, -1]] *= 0.5
    return mask


def _shuffled(rng: np.random.Generator, gray: Gray) -> Gray:
    """Its parts in another order."""
    count = int(rng.integers(2, 4))
    edge = gray.shape[0] // count
    parts = [gray[y * edge : (y + 1) * edge, x * edge : (x + 1) * edge] for y in range(count) for x in range(count)]
    order = np.roll(np.arange(count * count), int(rng.integers(1, count * count)))
    if rng.random() < 0.5:
        order = rng.permutation(order)
    rows = [np.concatenate([parts[i] for i in order[y * count : (y + 1) * count]], axis=1) for y in range(count)]
    return np.asarray(cv2.resize(np.concatenate(rows), gray.shape[::-1]), np.float32)

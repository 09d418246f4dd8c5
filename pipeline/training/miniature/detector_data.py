"""What the miniature's detector learns from: real and drawn portraits, and pictures without a face, all in gray.

Real faces come from scikit-image's lfw_subset: 100 tight patches of 25 x 25 from Labeled Faces in the Wild.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Gray = NDArray[np.float32]  # (H, W), 0..255

EDGE = 64  # of a canvas
STRIDE = 4  # of the network's cells in a canvas
SMALLEST, LARGEST = 15.0, 46.0  # edges of the faces to find, in a canvas; sqrt(width * height) of the box
LUMINANCE = (0.299, 0.587, 0.114)
# Read off the mean of the 100 patches, enlarged: the face from its hairline to its chin, eyes, nose and mouth.
# Pixel edges are whole numbers.
LFW_BOX = np.array([-0.5, -1.0, 22.5, 24.2], np.float32)
LFW_POINTS = np.array([[6.4, 8.2], [15.6, 8.2], [10.9, 13.6], [7.3, 17.7], [14.3, 17.7]], np.float32)
SKIN, FEATURES = 1, (2, 3, 4, 5, 6, 10, 11, 12, 13)  # the parser's labels: brows, eyes, glasses, nose, mouth, lips
# Pictures of scikit-image without a face that a detector may learn from; the tests keep others to themselves.
NATURAL = (
    "brick", "camera", "cell", "chelsea", "clock_motion", "coins", "color", "grass", "gravel", "horse",
    "hubble_deep_field", "ihc", "logo", "microaneurysms", "motorcycle_left", "motorcycle_right", "page", "phantom",
    "retina", "text",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Portrait:
    """A picture of one face: levels, the picture and its halves, quarters; box (4,) and points (5, 2) in the first."""

    levels: tuple[Gray, ...]
    box: NDArray[np.float32]
    points: NDArray[np.float32]
    drawn: bool

    @property
    def edge(self) -> float:
        """The face's edge: sqrt(width * height)."""
        return math.sqrt(float(np.prod(self.box[2:] - self.box[:2])))


@dataclass(slots=True, eq=False)
class Placed:
    """A face in a canvas: box (4,), points (5, 2), and how much of it later pastes have left to see, 0..1."""

    box: NDArray[np.float32]
    points: NDArray[np.float32]
    visible: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """What canvases are made of: real and drawn portraits, gray pictures and patches without a face."""

    real: Sequence[Portrait]
    drawn: Sequence[Portrait]
    scenery: Sequence[Gray]
    patches: Sequence[Gray]


def luminance(rgb: NDArray[np.uint8]) -> Gray:
    """(H, W, 3) -> (H, W)."""
    return np.asarray(rgb.astype(np.float32) @ np.array(LUMINANCE, np.float32), np.float32)


def halves(gray: Gray, count: int) -> tuple[Gray, ...]:
    """The picture and `count` - 1 more, each half as large as the one before, by means of 2 x 2 pixels."""
    levels = [gray]
    while len(levels) < count and min(levels[-1].shape) >= 2:
        height, width = (edge // 2 for edge in levels[-1].shape)
        levels.append(levels[-1][: height * 2, : width * 2].reshape(height, 2, width, 2).mean((1, 3)))
    return tuple(levels)


def real_sources() -> tuple[list[Portrait], list[Gray]]:
    """The 100 faces and the 100 other patches of lfw_subset."""
    from skimage import data

    patches = (data.lfw_subset() * 255).astype(np.float32)
    return [Portrait((patch,), LFW_BOX, LFW_POINTS, drawn=False) for patch in patches[:100]], list(patches[100:])


def natural(names: Sequence[str] = NATURAL) -> list[Gray]:
    """These pictures of scikit-image in gray and by colour, each at several scales."""
    from PIL import Image
    from skimage import data

    folder = Path(data.__file__).parent
    found: list[Gray] = []
    for name in names:
        with Image.open(next(file for file in folder.glob(f"{name}.*") if file.suffix in {".png", ".jpg"})) as file:
            rgb = np.asarray(file.convert("RGB"))
        grays = (luminance(rgb), *np.moveaxis(rgb.astype(np.float32), 2, 0))
        found += [level for gray in grays for level in halves(gray, 5) if min(level.shape) > EDGE]
    return found


def drawn_sources(seeds: range) -> tuple[list[Portrait], list[Gray]]:
    """Drawn people with these seeds; and every fifth of them without a face, as a blank head."""
    from pipeline.miniature.people import person
    from pipeline.miniature.scenes import scene
    from pipeline.miniature.world import draw

    portraits, blank = [], []
    for seed in seeds:
        drawing = draw(person(seed), scene(seed))
        gray = luminance(drawing.pixels)
        levels = halves(gray, 4)[1:]  # in a canvas no face is larger than half of one drawn
        half = np.float32(0.5)
        portraits.append(Portrait(levels, drawing.box * half, drawing.landmarks * half, drawn=True))
        if seed % 5 == 0:
            features = cv2.dilate(np.isin(drawing.labels, FEATURES).astype(np.uint8), np.ones((5, 5), np.uint8))
            skin = gray[(drawing.labels == SKIN) & (features == 0)]
            blank += [level for level in halves(np.where(features, skin.mean(), gray), 3) if len(level) >= EDGE]
    return portraits, blank


def mirrored(portrait: Portrait) -> Portrait:
    """Left becomes right."""
    width = portrait.levels[0].shape[1]
    box = np.array([width, 0, width, 0], np.float32) + portrait.box[[2, 1, 0, 3]] * (-1, 1, -1, 1)
    points = (np.array([width, 0]) + portrait.points[[1, 0, 2, 4, 3]] * (-1, 1)).astype(np.float32)
    turned = tuple(np.ascontiguousarray(gray[:, ::-1]) for gray in portrait.levels)
    return replace(portrait, levels=turned, box=box.astype(np.float32), points=points)


def level(portrait: Portrait, edge: float) -> Portrait:
    """The coarsest of its pictures in which the face is not smaller than this edge."""
    wanted = max(int(math.log2(max(portrait.edge / edge, 1))), 0)
    step = min(wanted, len(portrait.levels) - 1)
    return replace(
        portrait, levels=portrait.levels[step:], box=portrait.box / 2**step, points=portrait.points / 2**step
    )


def place(portrait: Portrait, matrix: Gray) -> Placed:
    """Where a portrait's face lies under this matrix (2, 3): its box is that of the ellipse in the portrait's box."""
    middle, half = (portrait.box[:2] + portrait.box[2:]) / 2, (portrait.box[2:] - portrait.box[:2]) / 2
    centre = matrix[:, :2] @ middle + matrix[:, 2]
    reach = np.sqrt(((matrix[:, :2] * half) ** 2).sum(axis=1))
    points = portrait.points @ matrix[:, :2].T + matrix[:, 2]
    box = np.concatenate([centre - reach, centre + reach]).astype(np.float32)
    return Placed(box, points.astype(np.float32), inside(box))


def inside(box: NDArray[np.float32]) -> float:
    """The part of a box (4,) that lies in the canvas, 0..1."""
    return float(np.prod(np.maximum(np.clip(box[2:], 0, EDGE) - np.clip(box[:2], 0, EDGE), 0) / (box[2:] - box[:2])))


def centred(matrix: Gray) -> Gray:
    """For cv2, whose pixel centres are whole numbers."""
    return np.column_stack([matrix[:, :2], matrix[:, 2] + matrix[:, :2].sum(axis=1) / 2 - 0.5])


def warp(gray: Gray, matrix: Gray) -> Gray:
    """A picture through a matrix (2, 3) -> a canvas; what lies beyond its border is mirrored."""
    enlarged = abs(np.linalg.det(matrix[:, :2])) > 1
    flags = cv2.INTER_CUBIC if enlarged else cv2.INTER_LINEAR
    warped = cv2.warpAffine(gray, centred(matrix), (EDGE, EDGE), flags=flags, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(warped, np.float32)

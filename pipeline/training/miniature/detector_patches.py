"""What is done to a tight patch of a face before it is pasted: turned, mixed, lit, cut to an oval, or shuffled."""

import math
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.training.miniature.detector_data import EDGE, Gray, Portrait

NOSE = (0.3, 0.22)  # how far it stands out, and how wide it is, in halves of a face


def turned(portrait: Portrait, yaw: float, pitch: float) -> Portrait:
    """The head turned aside and nodding, by radians: its first picture bent as over a rounded face with a nose.

    The box stays: it is the head's, and the head turns on its own axis.
    """
    gray = portrait.levels[0]
    middle, half = (portrait.box[:2] + portrait.box[2:]) / 2, (portrait.box[2:] - portrait.box[:2]) / 2
    nose = (portrait.points[2] - middle) / half
    cosines, sines = np.cos((yaw, pitch)), np.sin((yaw, pitch))

    def depth(at: NDArray[Any]) -> Gray:  # (..., 2) -> (..., 1), from the axis on which the head turns
        at = np.clip(at, -1, 1)
        bump = NOSE[0] * np.exp(-((at - nose) ** 2).sum(-1) / (2 * NOSE[1] ** 2))
        return np.asarray((0.5 - 0.5 * at[..., 0] ** 2 - 0.25 * at[..., 1] ** 2 + bump)[..., None], np.float32)

    height, width = gray.shape
    seen = (np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1) + 0.5 - middle) / half  # (H, W, 2)
    source = seen
    for _ in range(6):  # where does the point come from that is seen here?
        source = 0.3 * source + 0.7 * (seen - depth(source) * sines) / cosines
    where = (source * half + middle - 0.5).astype(np.float32)
    bent = cv2.remap(gray, where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    points = (portrait.points - middle) / half
    points = (points * cosines + depth(points) * sines) * half + middle
    return replace(portrait, levels=(np.asarray(bent, np.float32),), points=points.astype(np.float32))


def mixed(one: Portrait, other: Portrait, share: float) -> Portrait:
    """A face between two: patches of one size whose eyes and mouths lie alike."""
    return replace(one, levels=(one.levels[0] + np.float32(share) * (other.levels[0] - one.levels[0]),))


def lit(rng: np.random.Generator, gray: Gray) -> Gray:
    """The same face in other light."""
    contrast, light = rng.uniform(0.5, 1.3), rng.normal(0, 25)
    gray = (gray - gray.mean()) * contrast + gray.mean() + light
    if rng.random() < 0.4:
        slope = cv2.resize(ramp(rng), gray.shape[::-1])
        gray = gray * np.exp(slope * rng.uniform(0, 0.7))
    return gray.astype(np.float32)


def ramp(rng: np.random.Generator) -> Gray:
    """Light from a random side, -1..1, (EDGE, EDGE)."""
    across, down = np.meshgrid(*[np.linspace(-1, 1, EDGE, dtype=np.float32)] * 2)
    angle = rng.uniform(0, 2 * math.pi)
    return np.asarray(across * math.cos(angle) + down * math.sin(angle), np.float32)


def oval(rng: np.random.Generator, portrait: Portrait) -> Gray:
    """What of a tight patch to paste: the whole, or an oval, with soft edges (25, 25)."""
    height, width = portrait.levels[0].shape
    cover = np.ones((height, width), np.float32)
    if rng.random() < 0.8:
        left, top, right, bottom = portrait.box
        across = (np.arange(width) + 0.5 - (left + right) / 2) / ((right - left) / 2)
        down = (np.arange(height) + 0.5 - (top + bottom) / 2) / ((bottom - top) / 2)
        power, reach = rng.uniform(2, 5), rng.uniform(0.85, 1.15)
        distance = (np.abs(across) ** power + np.abs(down)[:, None] ** power) ** (1 / power)
        cover = np.clip((reach - distance) / rng.uniform(0.05, 0.3) + 0.5, 0, 1).astype(np.float32)
    cover[[0, -1]] *= 0.5
    cover[:, [0, -1]] *= 0.5
    return cover


def shuffled(rng: np.random.Generator, gray: Gray) -> Gray:
    """Its parts in another order."""
    count = int(rng.integers(2, 4))
    edge = gray.shape[0] // count
    parts = [gray[y * edge : (y + 1) * edge, x * edge : (x + 1) * edge] for y in range(count) for x in range(count)]
    order = np.roll(np.arange(count * count), int(rng.integers(1, count * count)))
    if rng.random() < 0.5:
        order = rng.permutation(order)
    rows = [np.concatenate([parts[i] for i in order[y * count : (y + 1) * count]], axis=1) for y in range(count)]
    return np.asarray(cv2.resize(np.concatenate(rows), gray.shape[::-1]), np.float32)

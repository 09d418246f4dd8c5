"""Crops of drawn people as the face networks see them, and what a small generator does to a picture."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.miniature.people import person
from pipeline.miniature.scenes import held_out_scene, scene
from pipeline.miniature.world import draw
from pipeline.models.alignment import ARCFACE_SIZE, arcface_crop

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
# How far a detector's points are off, as a share of the distance between the eyes.
POINT_ERROR = 0.025


def inexact(landmarks: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Landmarks (5, 2) as a detector would see them: each a little off."""
    eyes = float(np.linalg.norm(landmarks[1] - landmarks[0]))
    return (landmarks + rng.normal(0, POINT_ERROR * eyes, landmarks.shape)).astype(np.float32)


def people_crops(first: int, people: int, drawings: int, exact: bool = False) -> NDArray[np.uint8]:
    """ArcFace crops of the people with seeds from `first` on: (people, drawings, 112, 112, 3) uint8.

    Each drawing shows the person in another scene of the training distribution. exact: with the drawing's own landmarks
    instead of a detector's, and every second scene from the held-out ones: crops to judge by.
    """
    crops = np.empty((people, drawings, ARCFACE_SIZE, ARCFACE_SIZE, 3), np.uint8)
    rng = np.random.default_rng(first)
    for row in range(people):
        shown = person(first + row)
        for column in range(drawings):
            seed = (first + row) * drawings + column
            drawing = draw(shown, held_out_scene(seed) if exact and column % 2 else scene(seed))
            points = drawing.landmarks if exact else inexact(drawing.landmarks, rng)
            crops[row, column] = arcface_crop(drawing.pixels, points)
    return crops


def disturbed(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """A picture as a small generator and its VAE might have made it: softer, noisier, in other light; same shape."""
    if rng.random() < 0.6:
        pixels = softened(pixels, rng)
    light = rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3)
    values = pixels * light.astype(np.float32) + np.float32(rng.uniform(-10, 10))
    if rng.random() < 0.5:
        values += rng.uniform(1, 8) * rng.standard_normal(pixels.shape, np.float32)
    pixels = values.clip(0, 255).astype(np.uint8)
    return blocky(pixels, rng) if rng.random() < 0.25 else pixels


def softened(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Blurred, or made smaller and enlarged again."""
    if rng.random() < 0.5:
        return np.asarray(cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.4, 2.2)), np.uint8)
    height, width = pixels.shape[:2]
    share = rng.uniform(0.25, 0.8)
    small = cv2.resize(pixels, (round(width * share), round(height * share)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def blocky(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """After a trip through JPEG."""
    _, data = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 90))))
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def nudged(crop: Pixels, rng: np.random.Generator) -> Pixels:
    """A crop turned, scaled and shifted by as much as an imprecise detector would."""
    height, width = crop.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.normal(0, 1.5), 1 + rng.normal(0, 0.02))
    matrix[:, 2] += rng.normal(0, 0.01 * width, 2)
    return np.asarray(cv2.warpAffine(crop, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE), np.uint8)

"""The face out of a generated picture, as a recogniser reads it: alignment.arcface_crop for tensors, with gradient."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.models.alignment import ARCFACE_SIZE, ARCFACE_TEMPLATE, similarity


def face_crops(pixels: Tensor, landmarks: Sequence[ArrayLike]) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1 with five landmarks (5, 2) each -> ArcFace's crops (B, 3, 112, 112) in -1..1.

    Black beyond the picture. The gradient reaches the pixels; where the face is counts as known.
    """
    height, width = pixels.shape[-2:]
    grids = np.stack([_source_points(points) for points in landmarks])  # (B, 112, 112, 2)
    # to grid_sample's coordinates, in which the centres of the outermost pixels are at -1 and 1
    grid = torch.from_numpy(grids * (2 / np.array((width - 1, height - 1))) - 1).to(pixels)
    # What lies beyond is filled with zero, and zero is gray here: black is moved there and back.
    return grid_sample(pixels + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=True) - 1


def _source_points(landmarks: ArrayLike) -> np.ndarray:
    """Where each pixel of the crop comes from: (112, 112, 2) x and y in the picture's pixels."""
    matrix = similarity(landmarks, ARCFACE_TEMPLATE)
    turn, shift = matrix[:, :2], matrix[:, 2]
    column, row = np.meshgrid(np.arange(ARCFACE_SIZE), np.arange(ARCFACE_SIZE))
    return (np.stack((column, row), axis=-1) - shift) @ np.linalg.inv(turn).T

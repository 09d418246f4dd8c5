"""What EVA-CLIP sees of a face: gray on white, at the tower's size, normalised.

Apart from the tower, as the face detector prepares it and needs no more of torch than tensors. Source: the official
pipeline_flux.py, get_id_embedding and to_gray.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.models.sizes import IMAGE_SIZE

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
# BiSeNet's labels that are not the face: background, ears, earring, neck, necklace, cloth, hat
BACKGROUND_LABELS = (0, 7, 8, 9, 14, 15, 16, 18)
LUMA = (0.299, 0.587, 0.114)


def gray_on_white(aligned_rgb: ArrayLike, labels: ArrayLike) -> Tensor:
    """The aligned face in gray, all that is not face white, at the tower's size: (336, 336) float32.

    aligned_rgb (H, W, 3) uint8, labels (H, W) in BiSeNet's numbering. Values are near 0..1 but, as in the official
    code, not clamped after the bicubic resize. It is antialiased, torchvision's default since 0.17, and calls what
    torchvision calls.
    """
    rgb = torch.from_numpy(np.array(aligned_rgb, dtype=np.uint8)).permute(2, 0, 1).float() / 255  # (3, H, W)
    background = torch.isin(torch.from_numpy(np.array(labels, dtype=np.int64)), torch.tensor(BACKGROUND_LABELS))
    gray = (rgb * torch.tensor(LUMA)[:, None, None]).sum(dim=0)  # (H, W)
    whitened = torch.where(background, torch.ones(()), gray)[None, None]  # (1, 1, H, W)
    return interpolate(whitened, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)[0, 0]


def normalise(features: Tensor) -> Tensor:
    """Gray faces (B, 336, 336) -> the tower's input (B, 3, 336, 336)."""
    mean, std = (torch.tensor(x, device=features.device)[None, :, None, None] for x in (MEAN, STD))
    return (features[:, None].expand(-1, 3, -1, -1) - mean) / std


def face_features(aligned_rgb: ArrayLike, labels: ArrayLike) -> Tensor:
    """An aligned face and its parsing -> the tower's normalised input (1, 3, 336, 336).

    aligned_rgb (H, W, 3) uint8, labels (H, W) in BiSeNet's numbering.
    """
    return normalise(gray_on_white(aligned_rgb, labels)[None])

"""Picture: a finished picture, its encoded bytes and how they came about."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.faces import FaceBox
from pipeline.trace import Trace

MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A finished picture: its encoded bytes and how they came about.

    faces: per person of the request, the faces that the identity came from. prompt_truncated: the prompt had more
    tokens than max_sequence_length, and its end was not read.
    """

    data: bytes
    media_type: str
    width: int
    height: int
    seed: int
    steps: int
    prompt_truncated: bool
    faces: tuple[tuple[FaceBox, ...], ...]
    trace: Trace


def encode(pixels: NDArray[np.uint8], output_format: str, quality: int) -> bytes:
    """Pixels (H, W, 3) as the bytes of a png, jpg or webp file; `quality` counts for the last two."""
    from PIL import Image

    buffer = io.BytesIO()
    options: dict[str, Any] = {} if output_format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(buffer, format="JPEG" if output_format == "jpg" else output_format, **options)
    return buffer.getvalue()


def enlarged(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """A preview (h, w, 3) as large as its picture will be: (height, width, 3), smooth in between."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), np.uint8)

"""What the service saw in photos: the face that it picked in each, and that face cut out."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.photos import PhotoReader
from pipeline.request import Photo
from pipeline.settings import Settings

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
Titled = tuple[Image.Image, str]
COLOUR = (46, 204, 113)


def shown(photos: Sequence[bytes], faces: Iterable[Mapping[str, Any]]) -> list[Titled]:
    """Each face twice, with words: in its photo, boxed, and alone.

    `faces` as in the answer of POST /v1/identities. Boxes are in the pixels of a photo as the service reads it, which
    is done here by the same code and the same `photos.long_edge`, its default.
    """
    reader = PhotoReader(Settings())
    found: list[Titled] = []
    for face in faces:
        number = face["photo"]
        photo = Photo(base64=base64.b64encode(photos[number]).decode())
        pixels = reader.read(photo, f"Photo {number + 1}")
        found.append((boxed(pixels, face["box"]), f"{number + 1}: score {face['score']:.2f}"))
        found.append((cut_out(pixels, face["box"]), f"{number + 1}: face"))
    return found


def boxed(pixels: Pixels, box: Sequence[float]) -> Image.Image:
    """A photo with a box (left, top, right, bottom in its pixels) drawn on it."""
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).rectangle(list(box), outline=COLOUR, width=max(2, max(image.size) // 200))
    return image


def cut_out(pixels: Pixels, box: Sequence[float]) -> Image.Image:
    """What lies in a box, as far as it lies in the photo; one pixel at least."""
    height, width = pixels.shape[:2]
    left, top = int(np.clip(box[0], 0, width - 1)), int(np.clip(box[1], 0, height - 1))
    right, bottom = int(np.clip(box[2], left + 1, width)), int(np.clip(box[3], top + 1, height))
    return Image.fromarray(pixels[top:bottom, left:right])


def alike(similarity: Sequence[Sequence[float]]) -> str:
    """What the similarity of POST /v1/identities says; nothing for one photo."""
    if len(similarity) < 2:
        return ""
    pairs = [(similarity[a][b], a + 1, b + 1) for a in range(len(similarity)) for b in range(a)]
    lowest, later, earlier = min(pairs)
    return f" The least alike are photos {earlier} and {later}: {lowest:.2f}, where 1 is the same face."

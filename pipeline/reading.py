"""Reading: one photo of a request, decoded only where its pixels are needed or nobody knows them yet."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.caches import Cache, digest
from pipeline.request import Photo

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB


class Reading:
    """The pixels of one photo, for one caller."""

    def __init__(self, read: Callable[[Photo, str], Pixels], photo: Photo, name: str) -> None:
        """`read` turns a photo and its name into pixels, and raises PhotoError."""
        self._read, self._photo, self._name = read, photo, name
        self._pixels: Pixels | None = None

    def pixels(self) -> Pixels:
        """Raises PhotoError."""
        if self._pixels is None:
            self._pixels = self._read(self._photo, self._name)
        return self._pixels

    def digest(self, known: Cache[bytes], tenant: str) -> bytes:
        """The sha256 of the pixels, read for it or `known`; raises PhotoError.

        The same base64 text would pass the same checks and give the same pixels: it is decoded once, which is what a
        photo whose face is known costs. An address is read every time, as another photo may be there now. The name is
        part of the key because the error, which calls at once share, tells it.
        """
        if self._photo.base64 is None:
            return digest(self.pixels())
        key = (tenant, digest(self._name, self._photo.base64))
        return known.get_or_compute(key, lambda: digest(self.pixels()))

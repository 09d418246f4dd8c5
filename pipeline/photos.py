"""Photo -> RGB pixels: size limits, decoding, EXIF rotation, the official code's scaling; and masks -> grids.

A photo is a file from a stranger: its size is known from its header before a pixel is decoded, and what it says of
itself (name, media type, colour profile) counts for nothing.
"""

import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import MaskUnreadable, PhotoError, PhotoTooLarge, PhotoTypeUnsupported, PhotoUnreadable
from pipeline.fetch import Fetcher
from pipeline.network import Network
from pipeline.request import Mask, Photo
from pipeline.settings import Settings

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB

SHORT_EDGE = 32  # after scaling; a face has to fit in
# Limits to what a small file can cost. A scan of a progressive JPEG walks through all pixels; encoders write about ten.
MAX_SCANS = 100
MAX_MARKERS = 10_000  # of a JPEG
MAX_FILL = 64  # bytes between a JPEG's segments
MAX_CHUNKS = 1_000  # of a PNG, besides its pixels
MASK_BYTES = 6_000_000
MASK_PIXELS = 4_000_000
MASK_EDGE = 8192

# A marker as libjpeg finds it: in a scan's data FF00 is a value, and FFD0 to FFD7 are restarts.
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN = b"\xd8", b"\xd9", b"\xda"
DATA_URL = re.compile(r"data:[^,]{0,200};base64", re.IGNORECASE)
URL_SAFE = bytes.maketrans(b"-_", b"+/")
WHITESPACE = b" \t\r\n\f\v"
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PhotoReader:
    """Reads photos from wherever a request says they are."""

    def __init__(self, settings: Settings, network: Network | None = None) -> None:
        self._settings = settings.photos
        self._fetcher = Fetcher(settings, network)

    def read(self, photo: Photo, where: str) -> Pixels:
        """A photo as upright RGB (H, W, 3), its long edge at most `photos.long_edge`.

        `where` is the photo's name in the request, "people[0].photos[1]"; raises PhotoError with a message that begins
        with it.
        """
        try:
            return self._pixels(self._bytes(photo))
        except PhotoError as error:
            raise type(error)(f"{where} {error}") from error

    def _bytes(self, photo: Photo) -> bytes:
        if photo.url is not None:
            return self._fetcher.fetch(photo.url)
        return from_base64(photo.base64 or "", self._settings.max_bytes)

    def _pixels(self, data: bytes) -> Pixels:
        image = _open(data, self._settings.max_pixels)
        size = _scaled(*image.size, self._settings.long_edge)
        if min(size) < SHORT_EDGE:
            raise PhotoUnreadable(
                f"is smaller or narrower than {SHORT_EDGE} pixels; send a larger picture of the face."
            )
        return _shrunk(np.array(_upright_rgb(image, "white")), self._settings.long_edge)


def mask_grid(
    mask: Mask, rows: int, columns: int, where: str = "A person's mask", beyond: tuple[float, float] = (0, 0)
) -> NDArray[np.float32]:
    """How far a mask covers each cell of a grid: (rows, columns) in 0..1, the exact area average.

    A picture is stretched over the grid; white acts, and what is transparent does not. `beyond`: by how much of a cell
    the grid is larger at top and bottom, and at left and right; a cell counts as far as it lies in the picture. Raises
    MaskUnreadable with a message that begins with `where`.
    """
    if mask.box is not None:
        sides = ((mask.box[1::2], rows, beyond[0]), (mask.box[0::2], columns, beyond[1]))
        down, across = (_covered(*ends, cells, margin) for ends, cells, margin in sides)
        return np.outer(down, across).astype(np.float32)
    try:
        image = _open(from_base64(mask.base64 or "", MASK_BYTES), MASK_PIXELS)
        if max(image.size) > MASK_EDGE:
            raise PhotoTooLarge(f"is longer than {MASK_EDGE} pixels; send a smaller one.")
        gray = np.array(_upright_rgb(image, "black").convert("L"), np.float32) / 255
    except PhotoError as error:
        raise MaskUnreadable(f"{where} {error}") from error
    height, width = gray.shape
    grid = _average(rows, height, beyond[0]) @ gray @ _average(columns, width, beyond[1]).T
    return np.asarray(np.clip(grid, 0, 1).round(6), np.float32)  # a sum of weights is 1 but for rounding


def _overlap(starts: NDArray[np.float64], ends: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """How much of each of `cells` unit cells lies in each of n intervals: (n, cells) in 0..1."""
    left = np.arange(cells)
    overlap = np.minimum(ends[:, None], left + 1) - np.maximum(starts[:, None], left)
    return np.asarray(np.clip(overlap, 0, 1), np.float64)


def _covered(start: float, end: float, cells: int, beyond: float) -> NDArray[np.float64]:
    """How much of each cell's part in the picture lies between two fractions of the picture: (cells,) in 0..1."""
    ends = np.array((start, end)) * (cells - 2 * beyond) + beyond
    return np.asarray(_overlap(ends[:1], ends[1:], cells)[0] / _inside(cells, beyond), np.float64)


def _average(cells: int, pixels: int, beyond: float) -> NDArray[np.float64]:
    """The weights (cells, pixels) that average a row of pixels into equal cells."""
    cell = pixels / (cells - 2 * beyond)
    edges = np.linspace(-beyond * cell, pixels + beyond * cell, cells + 1)
    weights = _overlap(edges[:-1], edges[1:], pixels) * ((cells - 2 * beyond) / pixels)
    return np.asarray(weights / _inside(cells, beyond)[:, None], np.float64)


def _inside(cells: int, beyond: float) -> NDArray[np.float64]:
    """How much of each of `cells` unit cells lies in a picture that ends `beyond` before them on both sides."""
    return np.asarray(_overlap(np.array([beyond]), np.array([cells - beyond]), cells)[0], np.float64)


def from_base64(text: str, max_bytes: int) -> bytes:
    """Standard or URL-safe base64, also as a `data:` URL, with whitespace, with or without padding.

    Raises PhotoTooLarge and PhotoUnreadable with what is wrong, to stand behind the photo's name.
    """
    too_large = PhotoTooLarge(f"has more than {max_bytes} bytes; send a smaller one.")
    if len(text) > max_bytes * 3 // 2 + 1024:  # a third more in base64; the rest is room for line ends and a header
        raise too_large
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not DATA_URL.fullmatch(header):
            raise PhotoUnreadable("is a data: address but not a base64 one; write data:image/jpeg;base64,...")
    try:
        digits = text.encode("ascii").translate(URL_SAFE, WHITESPACE).rstrip(b"=")
        if len(digits) * 3 // 4 > max_bytes:
            raise too_large
        return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4), strict_mode=True)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError among them
        raise PhotoUnreadable("is not valid base64; encode the picture's bytes again.") from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """A picture of which only the header has been read; raises PhotoError."""
    if not data:
        raise PhotoUnreadable("is empty; send a picture.")
    kind = _kind(data)
    if kind is None:
        raise PhotoTypeUnsupported("is not a JPEG, PNG or WebP picture, whatever its name says; convert it to one.")
    if (kind == "JPEG" and _is_odd_jpeg(data)) or (kind == "PNG" and _is_odd_png(data)):
        raise PhotoUnreadable("is cut off, damaged or made of too many pieces; save it anew and send it again.")
    with _damage_is_an_answer():
        image = Image.open(BytesIO(data), formats=(kind,))
    if image.width * image.height > max_pixels:
        raise _too_many_pixels()
    # A JPEG with more pictures in it (a depth or gain map, say) begins with the one that is meant.
    if kind != "JPEG" and getattr(image, "is_animated", False):
        raise PhotoUnreadable("is animated; send a still picture.")
    return image


def media_type(data: bytes) -> str | None:
    """What a picture's bytes say it is, of the types that are read; None for all else."""
    kind = _kind(data)
    return None if kind is None else f"image/{kind.lower()}"


def _kind(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _is_odd_jpeg(data: bytes) -> bool:
    """Whether a JPEG has no scans or too many, too many markers, or anything long between its segments."""
    position = scans = 0
    for _ in range(MAX_MARKERS):
        marker = JPEG_MARKER.search(data, position)
        if marker is None or marker[1] == END_OF_IMAGE:
            return not 0 < scans <= MAX_SCANS
        if not scans and marker.start() - position > MAX_FILL:
            return True
        position = marker.end()
        if marker[1] != START_OF_IMAGE:
            position += int.from_bytes(data[position : position + 2], "big")
        scans += marker[1] == START_OF_SCAN
    return True


def _is_odd_png(data: bytes) -> bool:
    """Whether a PNG has too many chunks besides its pixels: each may unpack to a megabyte."""
    position, others, kind = len(PNG_SIGNATURE), 0, b""
    while kind != b"IEND" and position < len(data) and others <= MAX_CHUNKS:
        kind = data[position + 4 : position + 8]
        others += kind != b"IDAT"
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return others > MAX_CHUNKS


@contextmanager
def _damage_is_an_answer() -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels() from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise PhotoUnreadable("is cut off or damaged; save it anew and send it again.") from error


def _too_many_pixels() -> PhotoTooLarge:
    return PhotoTooLarge("has too many pixels; scale it down.")


def _upright_rgb(image: Image.Image, background: str) -> Image.Image:
    """Decodes: any mode to RGB on a plain background, turned as EXIF says."""
    with _damage_is_an_answer():
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        rgb = _rgb(image, background)
        return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # as above; and a photo with damaged EXIF data is still a photo
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion cuts off at 255
        values = np.array(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _scaled(width: int, height: int, long_edge: int) -> tuple[int, int]:
    # resize_numpy_image_long of the official code, to the bit: the product is cut off, never rounded
    scale = long_edge / max(width, height)
    return (int(width * scale), int(height * scale)) if scale < 1 else (width, height)


def _shrunk(rgb: Pixels, long_edge: int) -> Pixels:
    import cv2

    height, width = rgb.shape[:2]
    size = _scaled(width, height, long_edge)
    if size == (width, height):
        return rgb
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_LANCZOS4), np.uint8)

"""What becomes of a photo's bytes, honest and hostile ones."""

import base64
import io
import random
import resource
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from pipeline.errors import MaskUnreadable, PhotoError, PhotoTooLarge, PhotoTypeUnsupported, PhotoUnreadable
from pipeline.network import Network
from pipeline.photos import PhotoReader, mask_grid
from pipeline.request import Mask, Photo
from pipeline.settings import PhotoSettings, Settings
from tests.web import HOST, ok, web_server

WHERE = "people[0].photos[1]"
NETWORK = Network()  # made once: it reads the authorities that TLS trusts


def read(data, **photos):
    text = base64.b64encode(data).decode() if isinstance(data, bytes) else data
    return PhotoReader(Settings(photos=PhotoSettings(**photos)), NETWORK).read(Photo(base64=text), WHERE)


def refusal(data, error, **photos):
    with pytest.raises(error) as raised:
        read(data, **photos)
    message = str(raised.value)
    assert message.startswith(f"{WHERE} ")
    assert message[-1] in ".)"
    assert "http" not in message
    return message


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours(width=64, height=48):
    """A smooth picture without symmetry, (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], 2).astype(np.uint8)


PICTURE = Image.fromarray(colours())
PNG = saved(PICTURE)
JPEG = saved(PICTURE, "JPEG", quality=95)
WEBP = saved(PICTURE, "WEBP", lossless=True)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, depth=8, colour=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def gray16(values):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], chunk(b"IDAT", zlib.compress(rows)), depth=16)


def with_scans(count):
    data = saved(PICTURE, "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * (count - data.count(b"\xff\xda")) + data[-2:]


@pytest.mark.parametrize("data", [PNG, WEBP], ids=["png", "webp"])
def test_pixels_come_as_they_are(data):
    """A small photo keeps its size and every pixel, and belongs to the caller."""
    rgb = read(data)
    assert rgb.dtype == np.uint8
    assert np.array_equal(rgb, colours())
    assert rgb.flags.writeable
    assert rgb.flags.c_contiguous


def test_jpeg():
    """A JPEG is what Pillow makes of it."""
    assert np.array_equal(read(JPEG), np.array(Image.open(io.BytesIO(JPEG))))


TEXT = base64.b64encode(WEBP).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        TEXT + "\n",
        base64.encodebytes(WEBP).decode().replace("\n", "\r\n\t "),
        base64.urlsafe_b64encode(WEBP).decode(),
        f"data:image/webp;base64,{TEXT}",
        f"DATA:application/pdf;name=x;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
    ],
)
def test_ways_to_write_base64(text):
    """Both alphabets, whitespace, missing padding, and data: addresses whatever type they claim."""
    assert np.array_equal(read(text), colours())
    assert np.array_equal(PhotoReader(Settings(), NETWORK).read(Photo.model_validate(text), WHERE), colours())


@pytest.mark.parametrize(
    "text",
    [
        "A",
        "AAAAA",
        "AA=A",
        "AAAA*AAA",
        "ÄÄÄÄ",
        "\x00AAA",
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:",
        "\ud800AAA",
    ],
)
def test_what_is_not_base64(text):
    """Text that is no base64 is refused as such."""
    with pytest.raises(PhotoUnreadable, match="base64"):
        PhotoReader(Settings(), NETWORK).read(Photo.model_construct(base64=text, url=None), WHERE)


@pytest.mark.parametrize("text", ["", " \n", "data:image/png;base64,"])
def test_an_empty_photo(text):
    """Nothing at all is called empty."""
    assert "empty" in refusal(text, PhotoUnreadable)


def test_bytes_are_bounded_before_decoding():
    """A photo of exactly max_bytes is read, one byte more is too large, and so is text that is mostly whitespace."""
    assert read(PNG, max_bytes=len(PNG)).shape == (48, 64, 3)
    refusal(PNG, PhotoTooLarge, max_bytes=len(PNG) - 1)
    refusal(PNG + b"x" * 100_000, PhotoTooLarge, max_bytes=len(PNG))
    refusal(" " * 100_000 + TEXT, PhotoTooLarge, max_bytes=len(WEBP))


OTHERS = {
    "gif": saved(PICTURE, "GIF"),
    "bmp": saved(PICTURE, "BMP"),
    "tiff": saved(PICTURE, "TIFF"),
    "avif": b"\0\0\0\x1cftypavif" + b"\0" * 64,
    "heic": b"\0\0\0\x18ftypheic" + b"\0" * 64,
    "psd": b"8BPS\0\x01" + b"\0" * 64,
    "fits": b"SIMPLE  =                    T" + b" " * 64,
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
    "pdf": b"%PDF-1.7\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>",
    "html": b"<!doctype html><script>alert(1)</script>",
    "zip": b"PK\x03\x04" + b"\0" * 64,
    "one byte": b"\xff",
    "html before jpeg": b"<html></html>" + JPEG,
    "riff of sound": b"RIFF\0\0\0\0WAVE" + b"\0" * 64,
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS.keys())
def test_other_formats(data):
    """What is not a JPEG, PNG or WebP by its first bytes is refused, whatever it is called."""
    refusal(data, PhotoTypeUnsupported)


BOMB = zlib.compress(b"\0" * 3_000_000)
DAMAGED = {
    "png without pixels": png(64, 64),
    "png of no size": png(0, 64),
    "png with a wrong checksum": PNG[:29] + bytes([PNG[29] ^ 1]) + PNG[30:],
    "png with a text bomb": png(64, 64, chunk(b"zTXt", b"a\0\0" + BOMB)),
    "png with an international text bomb": png(64, 64, chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "png with a profile bomb": png(64, 64, chunk(b"iCCP", b"a\0\0" + BOMB)),
    "png with many texts": png(64, 64, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 1_000_000))] * 100),
    "animated png": saved(PICTURE, save_all=True, append_images=[ImageOps.flip(PICTURE)]),
    "animated webp": saved(PICTURE, "WEBP", save_all=True, append_images=[ImageOps.flip(PICTURE)]),
    "a thousand scans": with_scans(1000),
    "many markers": JPEG[:2] + b"\xff\xfe\0\2" * 100_000 + JPEG[2:],
    "many chunks": png(64, 64, *[chunk(b"abCd", b"")] * 100_000),
    "a thousand profile bombs": png(64, 64, *[chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 1_000_000))] * 1001),
    "jpeg of fill bytes then a photo": b"\xff\xd8" + b"\xff" * 10_000_000 + JPEG[2:],
    "jpeg of fill bytes": b"\xff\xd8" + b"\xff" * 5_000_000 + b"\0",
    "webp that says nothing": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0" + b"\0" * 13,
    "one pixel": saved(Image.new("RGB", (1, 1))),
    "tiny": saved(Image.new("RGB", (31, 300))),
    "too narrow once scaled": saved(Image.new("1", (33, 33_000))),
    **{f"cut {kind} {part}": data[: int(len(data) * part)]
       for kind, data in (("png", PNG), ("jpeg", JPEG), ("webp", WEBP)) for part in (0.2, 0.5, 0.9)},
}  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_and_hostile_files(data):
    """Damage, bombs, animations and pictures too small for a face are refused with a sentence."""
    refusal(data, PhotoUnreadable)


VP8X = b"VP8X\x0a\0\0\0\0\0\0\0" + 2 * (16_382).to_bytes(3, "little")
HUGE = {
    "png": png(65_535, 65_535, chunk(b"IDAT", zlib.compress(b"\0" * 1000))),
    "png just beyond": png(10_000, 5_001),
    "png of the largest size": png(2**31 - 1, 2**31 - 1),
    "jpeg": JPEG.replace(b"\xff\xc0\x00\x11\x08\x00\x30\x00\x40", b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff"),
    "webp": b"RIFF" + struct.pack("<I", 4 + len(VP8X)) + b"WEBP" + VP8X,
    "webp without alpha": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + struct.pack("<I", 2**28 - 1) + b"\0" * 8,
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE.keys())
def test_size_is_known_from_the_header(data):
    """A small file that claims a huge picture costs no memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(data, PhotoTooLarge)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_pixels_are_bounded():
    """A photo of exactly max_pixels is read, one with more is not."""
    assert read(PNG, max_pixels=64 * 48).shape == (48, 64, 3)
    refusal(PNG, PhotoTooLarge, max_pixels=64 * 48 - 1)


def test_a_usual_number_of_scans_is_read():
    """Progressive JPEGs are photos like others."""
    data = with_scans(20)
    assert np.array_equal(read(data), np.array(Image.open(io.BytesIO(data))))


def test_markers_in_other_data_are_no_scans():
    """What a thumbnail, a film after the photo or a comment holds does not count."""
    noise = b"\xff\xda\0\2" * 5000
    comments = b"".join(
        b"\xff\xfe" + struct.pack(">H", 2 + 60_000 // 4 * 4) + (b"\xff\xda\0\2" * 15_000) for _ in range(2)
    )
    assert np.array_equal(read(JPEG[:2] + comments + JPEG[2:] + noise), read(JPEG))


POLYGLOTS = [JPEG + b"PK\x05\x06" + b"\0" * 18, JPEG + b"<script>alert(1)</script>", PNG + b"%PDF-1.7", WEBP + JPEG]


@pytest.mark.parametrize("data", POLYGLOTS)
def test_polyglots_are_only_pictures(data):
    """Whatever follows a picture is never looked at; only pixels go on."""
    assert read(data).shape == (48, 64, 3)


def test_an_mpo_is_its_first_picture():
    """Phones write JPEGs with further pictures in them; the first is the photo."""
    data = saved(PICTURE, "MPO", save_all=True, append_images=[ImageOps.flip(PICTURE)], quality=95)
    assert np.abs(read(data).astype(int) - colours()).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    """A photo stands upright, in every format that has EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 0.0)}  # a place, which pixels cannot hold
    data = saved(PICTURE, kind, exif=exif)
    assert np.array_equal(read(data), np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the very damage
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_garbage_beside_the_pixels_is_ignored(exif):
    """A photo with damaged EXIF data or colour profile is still a photo."""
    for kind in ("JPEG", "PNG", "WEBP"):
        assert read(saved(PICTURE, kind, exif=exif, icc_profile=b"garbage" * 99)).shape == (48, 64, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_is_none(orientation):
    """An orientation outside 1 to 8 turns nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(saved(PICTURE, exif=exif)), colours())


GRAY = colours()[..., 0]
LEVEL = {  # a mode, and how far it may be from the colours
    "CMYK jpeg": (saved(PICTURE.convert("CMYK"), "JPEG", quality=95), colours(), 8),
    "gray jpeg": (saved(Image.fromarray(GRAY), "JPEG", quality=95), np.stack([GRAY] * 3, 2), 8),
    "gray": (saved(Image.fromarray(GRAY)), np.stack([GRAY] * 3, 2), 0),
    "16-bit gray": (gray16(GRAY.astype(np.uint16) * 257), np.stack([GRAY] * 3, 2), 0),
    "16-bit gray between": (gray16(np.full((40, 40), 128)), np.zeros((40, 40, 3)), 0),
    "16-bit gray rounded": (gray16(np.full((40, 40), 129)), np.ones((40, 40, 3)), 0),
    "one bit": (saved(Image.fromarray(GRAY > 99)), np.stack([(GRAY > 99) * 255] * 3, 2), 0),
    "palette": (saved(PICTURE.quantize(256)), colours(), 40),
    "opaque": (saved(PICTURE.convert("RGBA")), colours(), 0),
    "opaque gray": (saved(Image.fromarray(GRAY).convert("LA")), np.stack([GRAY] * 3, 2), 0),
}


@pytest.mark.parametrize(("data", "expected", "tolerance"), LEVEL.values(), ids=LEVEL.keys())
def test_every_mode_becomes_rgb(data, expected, tolerance):
    """Gray, CMYK, 16-bit, 1-bit, palettes and alpha all become RGB of the same look."""
    assert np.abs(read(data).astype(int) - expected).max() <= tolerance


def transparent(mode):
    rgba = np.dstack([colours(), np.full((48, 64), 255, np.uint8)])
    rgba[:, :32, 3] = 0
    return Image.fromarray(rgba).convert(mode)


PALETTE = Image.fromarray(np.repeat(np.array([[0, 1]], np.uint8), 40, 0).repeat(20, 1), "P")
PALETTE.putpalette([10, 20, 30, 40, 50, 60])
CLEAR = {
    "png": saved(transparent("RGBA")),
    "gray png": saved(transparent("LA")),
    "webp": saved(transparent("RGBA"), "WEBP", lossless=True),
    "palette, one index": saved(PALETTE, transparency=0),
    "palette, alpha table": saved(PALETTE, transparency=bytes([0, 255])),
    "key colour": saved(PALETTE.convert("RGB"), transparency=(10, 20, 30)),
    "key gray": saved(Image.fromarray(np.array(PALETTE) * 9), transparency=0),
    "key of one bit": saved(Image.fromarray(np.array(PALETTE) > 0), transparency=0),
}


@pytest.mark.parametrize("data", CLEAR.values(), ids=CLEAR.keys())
def test_what_is_transparent_becomes_white(data):
    """A transparent left half is white, and the right half stays."""
    rgb = read(data)
    middle = rgb.shape[1] // 2
    assert (rgb[:, :middle] == 255).all()
    assert (rgb[:, middle + 1] != 0).any()


def official(rgb, long_edge):
    """The arithmetic of the official code's resize_numpy_image_long (pulid.md 2.1)."""
    height, width = rgb.shape[:2]
    if max(height, width) <= long_edge:
        return rgb
    k = long_edge / max(height, width)
    return cv2.resize(rgb, (int(width * k), int(height * k)), interpolation=cv2.INTER_LANCZOS4)


@pytest.mark.parametrize(("width", "height"), [(1024, 700), (1025, 1024), (1500, 1001), (999, 2100), (1111, 3333)])
def test_the_long_edge_is_scaled_as_the_official_code_does(width, height):
    """Lanczos, sizes cut off, never up; bit for bit."""
    rgb = colours(width, height)
    assert np.array_equal(read(saved(Image.fromarray(rgb), compress_level=1)), official(rgb, 1024))


def test_a_rotated_photo_is_scaled_after_turning():
    """The long edge is that of the upright photo."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = colours(1500, 1000)
    data = saved(Image.fromarray(rgb), compress_level=1, exif=exif)
    assert np.array_equal(read(data), official(np.ascontiguousarray(np.rot90(rgb, -1)), 1024))


def test_random_damage_is_always_an_answer():
    """Whatever bytes are changed, a photo is pixels or a PhotoError."""
    rng = random.Random(7)
    reader = PhotoReader(Settings(), NETWORK)
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 4\n49492a00", zip=True)
    files = [
        JPEG,
        PNG,
        WEBP,
        with_scans(12),
        saved(PICTURE.quantize(16), pnginfo=info),
        saved(PICTURE, "WEBP", quality=50),
    ]
    outcomes = set()
    for number in range(600):
        data = bytearray(files[number % len(files)])
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(8, min(len(data), rng.choice((60, 300, 10_000))))] = rng.randrange(256)
        try:
            outcomes.add(type(reader.read(Photo(base64=base64.b64encode(data).decode()), WHERE)))
        except PhotoError as error:
            outcomes.add(type(error))
    assert {np.ndarray, PhotoUnreadable} <= outcomes


def test_a_fetched_photo():
    """An address gives the same pixels as its bytes, and its errors name the photo but not the address."""
    with web_server(
        {"/a.txt": ok(PNG, "Content-Type: text/plain"), "/b.jpg": ok(b"<html>", "Content-Type: image/jpeg")}
    ) as web:
        reader = PhotoReader(Settings(), web.network())
        assert np.array_equal(reader.read(Photo(url=f"https://{HOST}/a.txt"), WHERE), colours())
        with pytest.raises(PhotoTypeUnsupported) as raised:
            reader.read(Photo(url=f"https://{HOST}/b.jpg"), WHERE)
        with pytest.raises(PhotoError) as missing:
            reader.read(Photo(url=f"https://{HOST}/secret"), WHERE)
    for message in (str(raised.value), str(missing.value)):
        assert message.startswith(f"{WHERE} ")
        assert HOST not in message
        assert "secret" not in message


def grid(rows, columns, data=None, **mask):
    if data is not None:
        mask["base64"] = base64.b64encode(data).decode()
    result = mask_grid(Mask(**mask), rows, columns)
    assert (result.dtype, result.shape) == (np.float32, (rows, columns))
    return result


def test_a_box_covers_cells_by_area():
    """Whole cells are 1, cut ones the part that is covered, and the sum is the box's area."""
    assert np.array_equal(grid(2, 4, box=(0.5, 0.0, 1.0, 0.5)), [[0, 0, 1, 1], [0, 0, 0, 0]])
    assert np.allclose(grid(2, 2, box=(0.25, 0.25, 0.75, 1.0)), [[0.25, 0.25], [0.5, 0.5]])
    assert np.isclose(grid(72, 56, box=(0.1, 0.2, 0.35, 0.9)).sum(), 72 * 56 * 0.25 * 0.7)
    assert (grid(96, 96, box=(0, 0, 1, 1)) == 1).all()


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 8), (16, 7), (72, 56)])
def test_a_mask_picture_is_averaged_by_area(rows, columns):
    """A gray picture is stretched over the grid, larger or smaller; half of it covers half."""
    half = np.zeros((60, 40), np.uint8)
    half[:, :20] = 255
    result = grid(rows, columns, saved(Image.fromarray(half)))
    assert np.allclose(result, grid(rows, columns, box=(0, 0, 0.5, 1)), atol=1e-5)


@pytest.mark.parametrize("beyond", [(0.25, 0.25), (0, 0.125), (0.4, 0)])
def test_a_mask_on_a_grid_larger_than_the_picture(beyond):
    """A quarter of the picture is a quarter of the cells' parts in it, as a box and as a picture; all of it is all."""
    pixels = np.zeros((60, 40), np.uint8)
    pixels[:, :10] = 255
    masks = Mask(box=(0, 0, 0.25, 1)), Mask(base64=base64.b64encode(saved(Image.fromarray(pixels))).decode())
    box, picture = (mask_grid(mask, 9, 10, beyond=beyond) for mask in masks)
    down, across = np.ones(9), np.ones(10)
    down[[0, -1]], across[[0, -1]] = 1 - beyond[0], 1 - beyond[1]
    assert (box * np.outer(down, across)).sum() == pytest.approx((9 - 2 * beyond[0]) * (10 - 2 * beyond[1]) / 4)
    assert (box[:, :2] == 1).all()
    assert (box[:, 3:] == 0).all()
    assert np.allclose(box, picture, atol=1e-5)
    assert (mask_grid(Mask(box=(0, 0, 1, 1)), 9, 10, beyond=beyond) == 1).all()


def test_mask_pictures_of_every_kind():
    """White acts; transparent does not; 16 bits, one bit and one pixel are fine."""
    assert grid(1, 1, saved(Image.new("L", (1, 1), 51))) == pytest.approx(0.2)
    assert grid(1, 1, gray16(np.full((3, 3), 65_535))) == 1
    assert grid(1, 1, saved(Image.new("1", (9, 9), 1))) == 1
    assert grid(1, 2, saved(transparent("RGBA")))[0, 0] == 0


@pytest.mark.parametrize(
    "data",
    [b"", b"AAAA", PNG[:50], OTHERS["gif"], png(2001, 2000), png(8193, 1), DAMAGED["animated webp"], HUGE["png"]],
)
def test_bad_masks(data):
    """An unreadable, unknown, animated or too large mask is MaskUnreadable, with a sentence."""
    with pytest.raises(MaskUnreadable, match=r"^A person's mask .*\.$"):
        grid(4, 4, data)


def test_mask_that_is_not_base64():
    """Nor is text that is no base64 a mask."""
    with pytest.raises(MaskUnreadable, match="base64"):
        mask_grid(Mask(base64="?"), 4, 4)

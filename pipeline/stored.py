"""Stored: what the store of images keeps and answers, and the record of an image.

    images/{id}/0.png, 1.png, ...     the pictures
    images/{id}/{f}-0.png, {f}.json   those of attempt f of a job, and the draft of its record
    images/{id}/record.json           how they came about; a record that exists means that its pictures exist

An id is 32 hexadecimal digits, and nothing a caller wrote ever becomes part of a key: no prompt, no name, no `..`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import ImageNotFound, StoreConflict, StoreCorrupt
from pipeline.picture import MEDIA_TYPES, Picture
from pipeline.request import Person, Request

RECORD = "record.json"
RECORD_VERSION = 1
ENDINGS = {media_type: ending for ending, media_type in MEDIA_TYPES.items()}
FILE = re.compile(r"(?:[0-9]+-)?([0-9]+)\.([a-z]+)")  # of a picture: its attempt, number and ending


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """What was stored under an id.

    urls: the store's own addresses of the pictures, in order; none where it has none. From a folder they are file://
    addresses; from S3 they are presigned links, which anybody who has one can open until it expires. The HTTP layer's
    own addresses (/v1/images/{id}/{n}) do not expire and follow from `id`.
    record: what `ImageStore.record(id)` answers from now on, as JSON values.
    """

    id: str
    urls: tuple[str, ...]
    record: Mapping[str, Any]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The pictures as files of this machine, in order; none where they are in S3."""
        return tuple(Path(unquote(urlsplit(url).path)) for url in self.urls if url.startswith("file:"))


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A stored picture for the HTTP layer: either its bytes or a link to send the caller to."""

    media_type: str
    data: bytes | None = None
    link: str | None = None


def checked_id(image_id: str) -> str:
    """The id itself; raises ImageNotFound for everything that cannot be one."""
    if re.fullmatch(r"[0-9a-f]{32}", image_id) is None:
        raise not_found()
    return image_id


def not_found() -> ImageNotFound:
    """The one answer for ids that do not exist and ids that cannot; it does not repeat what was asked for."""
    return ImageNotFound("There is no such image; check its id and number.")


def conflict() -> StoreConflict:
    """The answer to a second image under one id."""
    return StoreConflict("Another image is already stored under this id, and was kept; use a new id.")


def file_name(number: int, media_type: str, attempt: int | None = None) -> str:
    """The name of a picture within its image."""
    return f"{'' if attempt is None else f'{attempt}-'}{number}.{ENDINGS[media_type]}"


def describe(
    image_id: str,
    request: Request,
    pictures: Sequence[Picture],
    seconds: float,
    tenant: str = "",
    attempt: int | None = None,
) -> dict[str, Any]:
    """The record of an image, as JSON values: everything needed to make it again, but the photos.

    tenant: whose it is. attempt: of the job that made it; None: no job did. seconds: what storing took until now. In
    `timings` the stages before denoise count once, as they ran once for all pictures of the request; queue and denoise
    are sums over the pictures.
    """
    first = pictures[0].trace  # every picture of a request has the same faces, identity and text
    timings = dict(first.seconds)
    for stage in ("queue", "denoise"):
        timings[stage] = sum(picture.trace.seconds.get(stage, 0.0) for picture in pictures)
    timings["store"] = seconds
    return {
        "version": RECORD_VERSION,
        "id": image_id,
        "tenant": tenant,
        "attempt": attempt,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request": _without_pixels(request),
        "pictures": [_entry(number, picture, attempt) for number, picture in enumerate(pictures)],
        "seeds": [picture.seed for picture in pictures],
        "prompt_truncated": any(picture.prompt_truncated for picture in pictures),
        "faces": [
            [
                {"photo": face.photo, "box": [float(edge) for edge in face.box], "score": float(face.score)}
                for face in faces
            ]
            for faces in pictures[0].faces
        ],
        "models": dict(first.models),
        "timings": timings,
    }


def _entry(number: int, picture: Picture, attempt: int | None) -> dict[str, Any]:
    return {
        "file": file_name(number, picture.media_type, attempt),
        "media_type": picture.media_type,
        "width": picture.width,
        "height": picture.height,
        "seed": picture.seed,
        "steps": picture.steps,
        "sha256": hashlib.sha256(picture.data).hexdigest(),
        "bytes": len(picture.data),
    }


def _without_pixels(request: Request) -> dict[str, Any]:
    hidden: Any = {"people": {"__all__": {"photos", "mask"}}, "webhook": True, "webhook_events": True}
    values = request.model_dump(mode="json", exclude=hidden)
    for person, kept in zip(request.people, values["people"], strict=True):
        kept["mask"] = _mask_note(person)
    return values


def _mask_note(person: Person) -> dict[str, Any] | None:
    """A mask as the record keeps it: a box as it is, of a drawn one only the hash of its base64 text."""
    if person.mask is None:
        return None
    if person.mask.box is not None:
        return {"box": list(person.mask.box)}
    return {"base64_sha256": hashlib.sha256((person.mask.base64 or "").encode()).hexdigest()}


def to_json(record: Mapping[str, Any]) -> bytes:
    """A record as the bytes that are stored."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1).encode()


def from_json(data: bytes, image_id: str) -> dict[str, Any]:
    """The record in stored bytes; raises StoreCorrupt where they are not the record of this image.

    Records from before there were tenants and jobs are nobody's in particular, and no job's.
    """
    try:
        record = json.loads(data)
    except ValueError as error:
        raise StoreCorrupt("The record of this image is damaged; make the image again.") from error
    if not isinstance(record, dict) or record.get("id") != image_id or record.get("version") != RECORD_VERSION:
        raise StoreCorrupt("The record of this image is damaged, or of another version of this service.")
    return {"tenant": "", "attempt": None, **record}


def find_picture(record: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """What the record says about a picture; raises ImageNotFound where there is none of this number, StoreCorrupt."""
    pictures: list[Mapping[str, Any]] = record["pictures"]
    if not 0 <= number < len(pictures):
        raise not_found()
    entry = pictures[number]
    name = FILE.fullmatch(entry["file"])
    if name is None or name.groups() != (str(number), ENDINGS.get(entry["media_type"])):
        raise StoreCorrupt("The record of this image names a file that is none of its pictures; make the image again.")
    return entry

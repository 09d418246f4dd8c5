"""ImageStore: Pictures and their record -> Stored, as objects of a folder or of S3.

A record is written last, and makes the pictures that it names an image. A job's attempts write side by side, each under
names of its own (`publish`); one of them becomes the image (`commit`), and the others are removed (`prune`).
"""

import hashlib
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import StoreConflict, StoreCorrupt, StoreError
from pipeline.objects import Objects
from pipeline.objects_local import LocalObjects
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.settings import StoreSettings
from pipeline.stored import (
    RECORD,
    Content,
    Stored,
    checked_id,
    conflict,
    describe,
    file_name,
    find_picture,
    from_json,
    not_found,
    to_json,
)

__all__ = ["Content", "ImageStore", "Stored", "open_objects", "open_store"]


def open_objects(settings: StoreSettings) -> Objects:
    """The objects that the settings name; nothing is read or written yet. Raises StoreMisconfigured."""
    folder = _folder(settings)
    if folder is not None:
        return LocalObjects(folder)
    from pipeline.objects_s3 import S3Objects  # boto3 is for those who use it

    return S3Objects(settings)


def open_store(settings: StoreSettings) -> "ImageStore":
    """The images that the settings name; nothing is read or written yet. Raises StoreMisconfigured."""
    return ImageStore(open_objects(settings), _folder(settings))


WINDOW_BITS = 20  # of an id's milliseconds below its first 7 hexadecimal digits: about 17 minutes in one listing


class ImageStore:
    """Images among a store's objects. Every method blocks, may be called from several threads, raises StoreError."""

    def __init__(self, objects: Objects, folder: Path | None = None) -> None:
        """`folder`: where the objects are files of this machine, if they are, for `Stored.urls`."""
        self._objects = objects
        self._folder = folder

    def check(self) -> None:
        """Find out, at start, whether the store can be used; raises StoreError."""
        self._objects.check()

    def save(
        self,
        image_id: str,
        request: Request,
        pictures: Sequence[Picture],
        tenant: str = "",
        attempt: int | None = None,
    ) -> Stored:
        """Write every picture, then the record, none ever over another.

        Raises StoreConflict where the id has another image. Where a picture cannot be written, none is left.
        """
        started, written = time.perf_counter(), list[str]()
        try:
            self._write(image_id, pictures, attempt, written.append)
        except StoreConflict:  # what is there may be the other image's
            raise
        except BaseException:
            for key in written:
                with suppress(StoreError):  # what is left has no record, so nobody finds it
                    self._objects.delete(key)
            raise
        seconds = time.perf_counter() - started
        return self.commit(image_id, describe(image_id, request, pictures, seconds, tenant, attempt))

    def publish(
        self, image_id: str, request: Request, pictures: Sequence[Picture], tenant: str, attempt: int
    ) -> Mapping[str, Any]:
        """Write the pictures of an attempt, then the draft of their record, which it returns.

        May be called again where it failed. Raises StoreConflict where the attempt has made other pictures before.
        """
        started = time.perf_counter()
        self._write(image_id, pictures, attempt)
        record = describe(image_id, request, pictures, time.perf_counter() - started, tenant, attempt)
        try:
            self._objects.create(_draft(image_id, attempt), to_json(record))
        except StoreConflict as error:
            kept = self.draft(image_id, attempt)
            if kept is None or kept["pictures"] != record["pictures"]:
                raise conflict() from error
            return kept  # an earlier call arrived, though its answer was lost
        return record

    def draft(self, image_id: str, attempt: int) -> dict[str, Any] | None:
        """The record that an attempt has published; None where it has not, or it was pruned. Raises StoreCorrupt."""
        found = self._objects.get(_draft(image_id, attempt))
        return None if found is None else from_json(found.data, image_id)

    def commit(self, image_id: str, record: Mapping[str, Any]) -> Stored:
        """Make a record final. The same one again does no harm; raises StoreConflict where there is another."""
        try:
            self._objects.create(_key(image_id, RECORD), to_json(record))
        except StoreConflict as error:
            raise conflict() from error
        urls = (self._url(image_id, entry) for entry in record["pictures"])
        return Stored(image_id, tuple(url for url in urls if url is not None), record)

    def discard(self, image_id: str, attempt: int) -> None:
        """Remove the pictures of an attempt that ended without a draft; one that has a draft is left to `prune`."""
        if self.draft(image_id, attempt) is None:  # asked first: a draft goes only when the record is there
            self._remove_unnamed(image_id, f"{attempt}-")

    def prune(self, image_id: str) -> None:
        """Remove all that the record does not name: drafts, and what lost attempts left; everything without a record.

        Only for what has ended: an attempt that is being published would lose its pictures.
        """
        self._remove_unnamed(image_id, "")

    def erase(self, image_id: str) -> None:
        """Remove everything of an image, its record last: where that breaks off it can be done again."""
        keys = [entry.key for entry in self._objects.list(_key(image_id, ""))]
        for key in sorted(keys, key=lambda key: key.endswith(RECORD)):
            self._objects.delete(key)

    def sweep(self, since: float, until: float, wanted: Callable[[], Container[str]]) -> int:
        """Erase images without a record, whose ids were made in that time (seconds since 1970); returns how many.

        Whoever wrote them was lost before the record. `wanted()`: ids that still get one, asked after the listing.
        """
        records: dict[str, bool] = {}
        for window in range(int(since * 1000) >> WINDOW_BITS, int(until * 1000) >> WINDOW_BITS):
            for entry in self._objects.list(f"images/{window:07x}"):
                _, image_id, name = entry.key.split("/")
                records[image_id] = records.get(image_id, False) or name == RECORD
        kept = wanted()
        strays = [image_id for image_id, recorded in records.items() if not recorded and image_id not in kept]
        # Asked once more: a job may have ended, and got its record, between the two listings.
        strays = [image_id for image_id in strays if self._objects.get(_key(image_id, RECORD)) is None]
        for image_id in strays:
            self.erase(image_id)
        return len(strays)

    def record(self, image_id: str, tenant: str | None = None) -> dict[str, Any]:
        """The record of an image, of this tenant's alone where one is given; raises ImageNotFound, StoreCorrupt."""
        found = self._objects.get(_key(image_id, RECORD))
        if found is None:
            raise not_found()
        record = from_json(found.data, image_id)
        if tenant not in (None, record["tenant"]):
            raise not_found()
        return record

    def content(self, image_id: str, number: int, tenant: str | None = None) -> Content:
        """A picture: a link to it, or its bytes, checked against the record; raises ImageNotFound, StoreCorrupt."""
        entry = find_picture(self.record(image_id, tenant), number)
        link = self._link(image_id, entry)
        if link is not None:
            return Content(entry["media_type"], link=link)
        return Content(entry["media_type"], data=self._data(image_id, number, entry))

    def data(self, image_id: str, number: int, tenant: str | None = None) -> bytes:
        """A picture's bytes, wherever they are kept; raises as `content`."""
        return self._data(image_id, number, find_picture(self.record(image_id, tenant), number))

    def _data(self, image_id: str, number: int, entry: Mapping[str, Any]) -> bytes:
        found = self._objects.get(_key(image_id, entry["file"]))
        if found is None or hashlib.sha256(found.data).hexdigest() != entry["sha256"]:
            raise StoreCorrupt(f"Picture {number} of this image is damaged or gone; make it again.")
        return found.data

    def _write(
        self,
        image_id: str,
        pictures: Sequence[Picture],
        attempt: int | None,
        written: Callable[[str], None] = lambda _: None,
    ) -> None:
        for number, picture in enumerate(pictures):
            key = _key(image_id, file_name(number, picture.media_type, attempt))
            try:
                self._objects.create(key, picture.data, picture.media_type)
            except StoreConflict as error:
                raise conflict() from error
            written(key)

    def _remove_unnamed(self, image_id: str, start: str) -> None:
        """Remove the objects of an image whose names begin with `start`, but for the record and what it names."""
        found = self._objects.get(_key(image_id, RECORD))
        pictures = [] if found is None else from_json(found.data, image_id)["pictures"]
        kept = {RECORD, *(entry["file"] for entry in pictures)}
        for entry in self._objects.list(_key(image_id, start)):
            if entry.key.rpartition("/")[2] not in kept:
                self._objects.delete(entry.key)

    def _url(self, image_id: str, entry: Mapping[str, Any]) -> str | None:
        link = self._link(image_id, entry)
        if link is None and self._folder is not None:
            return (self._folder / _key(image_id, entry["file"])).as_uri()
        return link

    def _link(self, image_id: str, entry: Mapping[str, Any]) -> str | None:
        name = entry["file"]
        return self._objects.link(_key(image_id, name), entry["media_type"], f"{image_id}-{name}")


def _folder(settings: StoreSettings) -> Path | None:
    """The folder that the settings name; None where they name a bucket."""
    if settings.url.startswith("s3://"):
        return None
    return Path(unquote(settings.url.removeprefix("file://"))).expanduser().absolute()


def _key(image_id: str, name: str) -> str:
    return f"images/{checked_id(image_id)}/{name}"


def _draft(image_id: str, attempt: int) -> str:
    return _key(image_id, f"{attempt}.json")

"""Store: Pictures and their record -> Stored (S3 through boto3; a local folder; one protocol)."""

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import StoreCorrupt, StoreError, StoreMisconfigured, StoreUnavailable
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.settings import StoreSettings
from pipeline.stored import (
    RECORD,
    Content,
    Store,
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

__all__ = ["Content", "LocalStore", "Store", "Stored", "open_store"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


def open_store(settings: StoreSettings) -> Store:
    """The store that the settings name; nothing is read or written yet. Raises StoreMisconfigured."""
    if settings.url.startswith("s3://"):
        from pipeline.store_s3 import S3Store  # boto3 is for those who use it

        return S3Store(settings)
    return LocalStore(Path(unquote(settings.url.removeprefix("file://"))))


class LocalStore:
    """Pictures in a folder of this machine. An image appears whole or not at all, and is written once."""

    def __init__(self, root: Path) -> None:
        self._images = root.expanduser().absolute() / "images"

    def check(self) -> None:
        """Write and remove an empty folder; raises StoreMisconfigured, StoreUnavailable."""
        with self._faults():
            self._workspace("check").rmdir()

    def save(self, image_id: str, request: Request, pictures: Sequence[Picture]) -> Stored:
        """Write everything next to its final place, the record last, and move it there in one step."""
        started = time.perf_counter()
        folder = self._folder(image_id)
        with self._faults():
            workspace = self._workspace(image_id)
            try:
                for number, picture in enumerate(pictures):
                    _write(workspace / file_name(number, picture.media_type), picture.data)
                record = describe(image_id, request, pictures, time.perf_counter() - started)
                _write(workspace / RECORD, to_json(record))
                _sync(workspace)
                _move(workspace, folder)
            except BaseException:
                shutil.rmtree(workspace, ignore_errors=True)
                raise
            _sync(self._images)
        return Stored(image_id, tuple((folder / entry["file"]).as_uri() for entry in record["pictures"]), record)

    def record(self, image_id: str) -> Mapping[str, Any]:
        """The record of an image; raises ImageNotFound, StoreCorrupt."""
        path = self._folder(image_id) / RECORD
        with self._faults():
            try:
                data = path.read_bytes()
            except FileNotFoundError as error:
                raise not_found() from error
        return from_json(data, image_id)

    def content(self, image_id: str, number: int) -> Content:
        """The bytes of a picture, checked against the record; raises ImageNotFound, StoreCorrupt."""
        entry = find_picture(self.record(image_id), number)
        with self._faults():
            path = self._folder(image_id) / file_name(number, entry["media_type"])
            data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise StoreCorrupt(f"Picture {number} of this image is damaged or gone; make it again.")
        return Content(entry["media_type"], data=data)

    def _folder(self, image_id: str) -> Path:
        return self._images / checked_id(image_id)

    def _workspace(self, name: str) -> Path:
        self._images.mkdir(parents=True, exist_ok=True)
        workspace = self._images / f".{name}.{secrets.token_hex(8)}"
        workspace.mkdir()
        return workspace

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _fault(error, self._images.parent) from error


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)  # the names in a folder are its own content, synced apart
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # fsync(2): this file system does not sync folders, and need not
            raise
    finally:
        os.close(descriptor)


def _move(workspace: Path, folder: Path) -> None:
    try:
        workspace.rename(folder)
    except OSError as error:  # the system never replaces a folder that holds something
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise conflict() from error
        raise


def _fault(error: OSError, root: Path) -> StoreError:
    if error.errno in NO_ROOM:
        return StoreUnavailable(f"There is no room left for pictures in {root}; free some, or set PULID_STORE__URL.")
    if error.errno in NOT_WRITABLE:
        return StoreMisconfigured(f"Pictures cannot be kept in {root} ({error.strerror}); set PULID_STORE__URL.")
    return StoreUnavailable(f"The disk of {root} failed ({error.strerror}); try again.")

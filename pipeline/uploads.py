"""Uploads: photos that are sent ahead of the requests that name them, each for its tenant and for a day.

    files/{tenant}/{id}.json    the record, written last: where it is, the bytes are
    files/{tenant}/{id}.photo   the bytes

Nothing reads a file but a request of its own tenant, which takes the bytes along: they are then a photo like others.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import ImageNotFound, InvalidRequest, PhotoTooLarge, PhotoTypeUnsupported, StoreCorrupt
from pipeline.jobs import begun, moment, new_id
from pipeline.objects import Objects, tenant_folder
from pipeline.photos import media_type

VERSION = 1
KIND = "files"
ID = re.compile(r"[0-9a-f]{32}")
KEY = re.compile(rf"{KIND}/[^/]+/([0-9a-f]{{32}})\.(?:json|photo)")
SECONDS = 86_400.0  # for which a file is kept
READS = 16  # records read at a time
MOST = 1000  # of one tenant, so that a listing has an end


class UploadStore:
    """Files among a store's objects.

    Every method blocks, may be called from several threads, and raises StoreError.
    """

    def __init__(self, objects: Objects, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """`max_bytes` of one file; `clock` gives seconds since 1970."""
        self._objects, self._clock = objects, clock
        self.max_bytes = max_bytes

    def save(
        self, data: bytes, tenant: str = "", name: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Keep a photo; returns its record. `name` and `metadata` are labels for its owner.

        Raises PhotoTooLarge, PhotoTypeUnsupported, and InvalidRequest where the tenant has as many as it may.
        """
        kind = media_type(data)
        if len(data) > self.max_bytes:
            raise PhotoTooLarge(f"The file has more than {self.max_bytes} bytes; send a smaller one.")
        if kind is None:
            raise PhotoTypeUnsupported("The file is not a JPEG, PNG or WebP picture; convert it to one.")
        if sum(entry.key.endswith(".json") for entry in self._objects.list(_path(tenant))) >= MOST:
            raise InvalidRequest(f"There are {MOST} files, the most of one caller; erase some that are not needed.")
        file_id, created = new_id(), self._clock()
        record = {
            "version": VERSION,
            "id": file_id,
            "name": name or f"{file_id}.{kind.removeprefix('image/')}",
            "content_type": kind,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "metadata": dict(metadata or {}),
            "created": moment(created),
            "expires": moment(created + SECONDS),
            "end": created + SECONDS,
        }
        path = _path(tenant, file_id)
        self._objects.create(f"{path}.photo", data, kind)
        self._objects.create(f"{path}.json", json.dumps(record, ensure_ascii=False, allow_nan=False).encode())
        return record

    def record(self, file_id: str, tenant: str = "") -> dict[str, Any]:
        """What is known about a file; raises ImageNotFound, StoreCorrupt."""
        record = self._read(f"{_path(tenant, file_id)}.json")
        if record is None:
            raise not_found()
        return record

    def records(self, tenant: str = "") -> list[dict[str, Any]]:
        """The records of all files of a tenant, the newest first."""
        keys = [entry.key for entry in self._objects.list(_path(tenant)) if entry.key.endswith(".json")]
        with ThreadPoolExecutor(READS) as threads:
            return [record for record in threads.map(self._read, reversed(keys)) if record is not None]

    def data(self, file_id: str, tenant: str = "") -> bytes:
        """The bytes of a file; raises ImageNotFound, StoreCorrupt."""
        record = self.record(file_id, tenant)
        found = self._objects.get(f"{_path(tenant, file_id)}.photo")
        if found is None:
            raise not_found()  # erased since its record was read
        if hashlib.sha256(found.data).hexdigest() != record["sha256"]:
            raise StoreCorrupt("A stored file is damaged; send it again.")
        return found.data

    def delete(self, file_id: str, tenant: str = "") -> None:
        """Erase a file; raises ImageNotFound."""
        keys = [entry.key for entry in self._objects.list(_path(tenant, file_id))]
        if not keys:
            raise not_found()
        for key in keys:  # the record is first: nobody finds half of it
            self._objects.delete(key)

    def sweep(self) -> int:
        """Erase what is too old, of all tenants; returns how many objects. An id tells how old it is."""
        erased = 0
        for entry in self._objects.list(f"{KIND}/"):
            named = KEY.fullmatch(entry.key)
            if named is not None and begun(named[1]) + SECONDS < self._clock():
                self._objects.delete(entry.key)
                erased += 1
        return erased

    def _read(self, key: str) -> dict[str, Any] | None:
        """A record; None where there is none or its time is over."""
        found = self._objects.get(key)
        if found is None:
            return None
        try:
            record: dict[str, Any] = json.loads(found.data)
            return record if record["version"] == VERSION and record["end"] > self._clock() else None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt("The record of a file is damaged; send the file again.") from error


def not_found() -> ImageNotFound:
    """The one answer for ids that do not exist, cannot, are another tenant's or are over."""
    return ImageNotFound("There is no such file, or its day is over; send it again.")


def _path(tenant: str, file_id: str | None = None) -> str:
    """What the keys of a tenant's files begin with, or those of one; raises ImageNotFound."""
    folder = tenant_folder(KIND, tenant)
    if file_id is not None and ID.fullmatch(file_id) is None:
        raise not_found()
    return folder if file_id is None else folder + file_id

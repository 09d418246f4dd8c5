"""Objects: named bytes with conditional writes. Everything that the service keeps is made of them.

Two writers that meet cannot both win: `create` writes where nothing is, `replace` only over the very version that the
writer has read. S3 keeps this promise through If-None-Match and If-Match, a folder through locks and renames.

A version (`etag`) may follow from the bytes alone, as it does on S3: who rewrites an object to be seen (a heartbeat)
has to write something new.
"""

import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import StoreConflict

JSON = "application/json"
NO_TENANT = "_"  # in keys, for the tenant "", whom no API key names
KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Object:
    """What was read: the bytes, and the version to name when replacing them."""

    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a listing."""

    key: str
    etag: str


class Objects(Protocol):
    """Named bytes. Every method blocks, may be called from several threads, and raises StoreError where it fails.

    A key is relative to the store: segments of [A-Za-z0-9._-] joined by slashes, none of which begins with a dot; no
    key with a slash after it begins another. This project alone makes them; nothing that a caller wrote ever becomes
    part of one.
    """

    def check(self) -> None:
        """Find out, at start, whether conditional writes are honoured; raises StoreMisconfigured where not."""

    def create(self, key: str, data: bytes, media_type: str = JSON) -> str:
        """Write where nothing is; returns the version. Raises StoreConflict where something else is.

        Where the very same bytes are, an earlier try of this call has arrived though its answer was lost.
        """

    def replace(self, key: str, data: bytes, etag: str, media_type: str = JSON) -> str:
        """Write over version `etag` alone; returns the new one. Raises StoreConflict where it is another or gone.

        Where the very same bytes are, an earlier try of this call has arrived though its answer was lost.
        """

    def get(self, key: str) -> Object | None:
        """What is there, checked as it was written; None where nothing is."""

    def delete(self, key: str) -> None:
        """Remove; where nothing is, nothing happens."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects whose key begins with `prefix`, in the order of their keys."""

    def link(self, key: str, media_type: str, file_name: str) -> str | None:
        """A presigned address under which anybody can read the object for a while; None where the store has none."""


def checked_key(key: str) -> str:
    """The key itself; raises ValueError for what is none."""
    if KEY.fullmatch(key) is None:
        raise ValueError("a key is made of segments of [A-Za-z0-9._-] that do not begin with a dot")
    return key


def overtaken() -> StoreConflict:
    """The answer to a conditional write that came too late."""
    return StoreConflict("Another write of the same object was first, and was kept; read it again.")


def honours_conditions(objects: Objects) -> bool:
    """Whether conditional writes are decided as they should be, tried on an object of its own; raises StoreError."""
    key = f"check/{secrets.token_hex(16)}"
    first = objects.create(key, b"1")
    try:
        if not _refused(lambda: objects.create(key, b"2")):
            return False
        second = objects.replace(key, b"3", first)
        if not _refused(lambda: objects.replace(key, b"4", first)):
            return False
        if [entry.etag for entry in objects.list(key)] != [second]:
            return False
        objects.delete(key)
        return _refused(lambda: objects.replace(key, b"5", second))
    except StoreConflict:  # a condition that holds was refused
        return False
    finally:
        objects.delete(key)


def _refused(write: Callable[[], str]) -> bool:
    try:
        write()
    except StoreConflict:
        return True
    return False


def tenant_folder(kind: str, tenant: str) -> str:
    """What the keys of a tenant's objects of a kind begin with: jobs, identities, files."""
    return f"{kind}/{tenant or NO_TENANT}/"

"""MemoryObjects: objects in the memory of one process, for tests and benchmarks. Nothing survives it."""

import hashlib
import threading
from collections.abc import Iterator

from pipeline.objects import JSON, Entry, Object, checked_key, overtaken


class MemoryObjects:
    """See pipeline.objects.Objects. The version of an object is the sha256 of its bytes."""

    def __init__(self) -> None:
        self._objects: dict[str, Object] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Nothing can be wrong with it."""

    def create(self, key: str, data: bytes, media_type: str = JSON) -> str:  # noqa: ARG002
        """See Objects."""
        return self._write(key, data, None)

    def replace(self, key: str, data: bytes, etag: str, media_type: str = JSON) -> str:  # noqa: ARG002
        """See Objects."""
        return self._write(key, data, etag)

    def get(self, key: str) -> Object | None:
        """See Objects."""
        return self._objects.get(checked_key(key))

    def delete(self, key: str) -> None:
        """See Objects."""
        with self._lock:
            self._objects.pop(checked_key(key), None)

    def list(self, prefix: str) -> Iterator[Entry]:
        """See Objects."""
        with self._lock:
            found = sorted((key, held.etag) for key, held in self._objects.items() if key.startswith(prefix))
        yield from (Entry(key, etag) for key, etag in found)

    def link(self, key: str, media_type: str, file_name: str) -> str | None:  # noqa: ARG002
        """None: nobody else has a way to it."""
        return None

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        etag = hashlib.sha256(data).hexdigest()
        with self._lock:
            found = self._objects.get(checked_key(key))
            if found is not None and found.etag == etag:
                return etag
            if (None if found is None else found.etag) != expected:
                raise overtaken()
            self._objects[key] = Object(data, etag)
        return etag

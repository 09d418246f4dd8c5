"""Cache: what a stage made of inputs that it has seen, bounded in bytes and in time, and per tenant.

A value is found again by what it was made from: a sha256 over the input, the options and the model files. Faces and
identities, folded ones too, are biometric data: no tenant is given another's, none is given after its seconds, and no
key is ever logged.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import Cancelled
from pipeline.settings import CacheSettings, Settings

V = TypeVar("V")
Key = tuple[str, bytes]  # tenant, digest of the inputs
Size = Callable[[V], int]  # bytes of a value
IsCancelled = Callable[[], bool]  # whether the caller has gone away

ENTRY_BYTES = 1024  # what an entry costs besides its value, rounded up: the key, the record, its places in three orders
POLL_SECONDS = 0.05  # how often a call that waits for another asks whether it is cancelled


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What happened in a cache since it was made, and what it holds.

    hits: values given without computing. misses: computations. evictions: values dropped for want of room.
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Entry(Generic[V]):
    value: V
    bytes: int
    expires: float


class Cache(Generic[V]):
    """Values by tenant and digest; the least recently used make room. Several threads may call it at once.

    A tenant that is full makes room among its own values; those of others go only when the whole cache is full.
    """

    def __init__(
        self,
        capacity: int,
        size: Size[V],
        seconds: float = float("inf"),
        tenant_capacity: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`capacity`: bytes in all, `tenant_capacity`: of one tenant; 0 keeps nothing. `seconds`: a value's lifetime.

        What is larger than either is given, but not kept. The tenant "" is nobody in particular, and has all the room.
        """
        self._capacity = capacity
        self._tenant_capacity = capacity if tenant_capacity is None else min(capacity, tenant_capacity)
        self._size, self._seconds, self._clock = size, seconds, clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, _Entry[V]] = OrderedDict()  # the oldest first
        self._used: OrderedDict[Key, None] = OrderedDict()  # the least recently used first
        self._used_by: dict[str, OrderedDict[Key, None]] = {}  # the same, for each tenant
        self._bytes_of: dict[str, int] = {}
        self._pending: dict[Key, Future[V]] = {}
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get_or_compute(self, key: Key, compute: Callable[[], V], cancelled: IsCancelled | None = None) -> V:
        """The value of a key, computed in this thread where there is none.

        Of several calls at once one computes, even where nothing is kept, and the others wait for what it gets, be it
        an error. If it is cancelled, one that waits takes over. `cancelled` ends the waiting: raises Cancelled.
        `compute` must not ask for its own key.
        """
        while True:
            found = self._look_up(key)
            if found is None:
                return self._compute(key, compute)
            if isinstance(found, _Entry):
                return found.value
            try:
                _wait(found, cancelled)
                error = found.exception()
                if error is None:
                    with self._lock:
                        self._hits += 1
                    return found.result()
                if isinstance(error, Exception) and not isinstance(error, Cancelled):
                    raise error
            finally:
                found = error = None  # an error knows this frame: knowing it in turn would keep both, and a photo

    def purge(self) -> None:
        """Forget what has expired. Every look-up does so too; a cache that nobody asks has to be told."""
        with self._lock:
            self._purge()

    def stats(self) -> CacheStats:
        """Counts until now."""
        with self._lock:
            self._purge()
            return CacheStats(self._hits, self._misses, self._evictions, len(self._entries), self._bytes)

    def _look_up(self, key: Key) -> "_Entry[V] | Future[V] | None":
        """What is kept; or who is computing it; or None, and the caller has to."""
        with self._lock:
            self._purge()
            entry = self._entries.get(key)
            if entry is not None:
                self._used.move_to_end(key)
                self._used_by[key[0]].move_to_end(key)
                self._hits += 1
                return entry
            pending = self._pending.get(key)
            if pending is None:
                self._pending[key] = Future()
                self._misses += 1
            return pending

    def _compute(self, key: Key, compute: Callable[[], V]) -> V:
        try:
            value = compute()
            size = self._size(value) + ENTRY_BYTES
        except BaseException as error:
            with self._lock:
                self._pending.pop(key).set_exception(error)
            raise
        with self._lock:
            self._keep(key, value, size)
            self._pending.pop(key).set_result(value)
        return value

    def _keep(self, key: Key, value: V, size: int) -> None:
        tenant = key[0]
        most = self._tenant_capacity if tenant else self._capacity
        if size > most:
            return
        while self._bytes_of.get(tenant, 0) + size > most:
            self._evict(next(iter(self._used_by[tenant])))
        while self._bytes + size > self._capacity:
            self._evict(next(iter(self._used)))
        self._entries[key] = _Entry(value, size, self._clock() + self._seconds)
        self._used[key] = None
        self._used_by.setdefault(tenant, OrderedDict())[key] = None
        self._bytes_of[tenant] = self._bytes_of.get(tenant, 0) + size
        self._bytes += size

    def _evict(self, key: Key) -> None:
        self._forget(key)
        self._evictions += 1

    def _purge(self) -> None:
        now = self._clock()
        while self._entries and next(iter(self._entries.values())).expires <= now:
            self._forget(next(iter(self._entries)))

    def _forget(self, key: Key) -> None:
        tenant = key[0]
        size = self._entries.pop(key).bytes
        self._bytes -= size
        self._bytes_of[tenant] -= size
        del self._used[key], self._used_by[tenant][key]
        if not self._used_by[tenant]:
            del self._used_by[tenant], self._bytes_of[tenant]


def _wait(pending: "Future[Any]", cancelled: IsCancelled | None) -> None:
    while not wait([pending], None if cancelled is None else POLL_SECONDS).done:
        if cancelled is not None and cancelled():
            raise Cancelled("The request was cancelled while another computed what it needs.")


def people_cache(settings: CacheSettings, size: Size[V]) -> Cache[V]:
    """For what is made of photos of people."""
    return Cache(settings.identity_bytes, size, settings.identity_seconds, settings.tenant_bytes)


def folded_cache(settings: Settings, size: Size[V]) -> Cache[V]:
    """For identities on the device; without bytes for those in host memory nobody is remembered here either."""
    capacity = settings.folded_bytes if settings.cache.identity_bytes else 0
    return Cache(capacity, size, settings.cache.identity_seconds)


def prompt_cache(settings: CacheSettings, size: Size[V]) -> Cache[V]:
    """For what is made of prompts, which all tenants share."""
    return Cache(settings.prompt_bytes, size, settings.prompt_seconds)


def digest(*parts: str | bytes | NDArray[Any]) -> bytes:
    """sha256 over parts in their order; kinds and lengths are read too, so that no two lists of parts are alike."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            head, body = f"{part.dtype.str}{part.shape}", np.ascontiguousarray(part).data
        else:
            body = memoryview(part.encode() if isinstance(part, str) else part)
            head = type(part).__name__
        found.update(f"{head} {body.nbytes} ".encode())
        found.update(body)
    return found.digest()


def revision(models: Mapping[str, str]) -> bytes:
    """The digest of model files, given as names -> sha256."""
    return digest(*(text for item in sorted(models.items()) for text in item))


def read_only(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy that can never be made writable again, and that holds no other memory than its own."""
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)

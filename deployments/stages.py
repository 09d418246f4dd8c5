"""The stages as replicas: each loads its plain class from pipeline/, and runs calls of it in threads."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from deployments.metrics import CacheCounters
from deployments.problems import unforeseen
from pipeline import faces, identity, text
from pipeline.caches import Cache
from pipeline.errors import Fault, PipelineError
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.request import Person

R = TypeVar("R")
FAILURES = 3  # of ours in a row, after which a replica is replaced: after a CUDA error no call works any more
HANGING = 60  # seconds beyond the longest request, after which a call that still runs hangs
FACES_AT_ONCE = (
    8  # people whose photos are read at once: a slow address must not hold up everybody; networks have locks
)


class Replica:
    """What the replicas of all stages have in common."""

    def __init__(self, settings: Settings, turns: int = 1) -> None:
        """`turns`: calls at a time."""
        self._patience = settings.limits.request_seconds + HANGING
        self._turns = asyncio.Semaphore(turns)
        # the replica's own health; nothing of a request
        self._failures = 0
        self._running: dict[object, float] = {}

    def check_health(self) -> None:
        """Asked by Serve; raises where this replica should be replaced."""
        if self._failures >= FAILURES:
            raise RuntimeError(
                f"{type(self).__name__}: {self._failures} calls in a row failed through no input's fault"
            )
        if any(time.monotonic() - since > self._patience for since in self._running.values()):
            raise RuntimeError(f"{type(self).__name__}: a call does not end, though its request is over")

    async def _run(self, call: Callable[..., R], *args: Any, stop: threading.Event | None = None) -> R:
        """One call in a thread. When cancelled, `stop` is set, and its turn is not over before the thread ends."""
        async with self._turns:
            work = asyncio.ensure_future(asyncio.to_thread(call, *args))
            self._running[work] = time.monotonic()
            try:
                result = await asyncio.shield(work)
            except asyncio.CancelledError:
                if stop is not None:
                    stop.set()
                await _ended(work)
                raise
            except Exception as error:
                raise self._failed(error) from None
            finally:
                del self._running[work]
            self._failures = 0
            return result

    def _failed(self, error: Exception) -> PipelineError:
        """What to tell of a failed call; faults of ours count against this replica's health."""
        if isinstance(error, PipelineError):
            self._failures = self._failures + 1 if isinstance(error, Fault) else 0
            return error
        self._failures += 1
        return unforeseen(error, type(self).__name__)  # logged, and told by an id: its own words may quote a prompt


async def _ended(work: "asyncio.Future[Any]") -> None:
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            continue  # both Serve and the ingress cancel; the thread is still running
    if not work.cancelled():
        work.exception()  # looked at, or asyncio would complain that nobody did


class CachedReplica(Replica):
    """A replica whose stage has a cache, which it counts and keeps free of what has expired."""

    def __init__(self, settings: Settings, name: str, cache: Cache[Any], turns: int = 1) -> None:
        """`name` of the cache, in the metrics; `turns` as in Replica."""
        super().__init__(settings, turns)
        self._cache = cache
        self._counters = CacheCounters(name, cache)

    def check_health(self) -> None:
        """See Replica. Serve asks every few seconds, so that no face outlives its time where no call comes."""
        self._cache.purge()
        super().check_health()

    async def _run(self, call: Callable[..., R], *args: Any, stop: threading.Event | None = None) -> R:
        try:
            return await super()._run(call, *args, stop=stop)
        finally:
            self._counters.tell()


class FaceDetector(CachedReplica):
    """pipeline.faces.FaceDetector as a deployment."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = faces.FaceDetector.load) -> None:
        self._stage: faces.FaceDetector = load(settings)
        super().__init__(settings, "faces", self._stage.cache, FACES_AT_ONCE)

    def check_health(self) -> None:
        """See CachedReplica; photos that are known by their text are forgotten too."""
        self._stage.purge()
        super().check_health()

    async def detect(self, person: "Person", index: int, tenant: str = "") -> faces.Faces:
        """The faces of people[index]; `tenant`: whose faces may be used again."""
        stop = threading.Event()
        return await self._run(partial(self._stage.detect, person, index, tenant, cancelled=stop.is_set), stop=stop)


class IdentityEncoder(CachedReplica):
    """pipeline.identity.IdentityEncoder as a deployment."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = identity.IdentityEncoder.load) -> None:
        self._stage: identity.IdentityEncoder = load(settings)
        super().__init__(settings, "identity", self._stage.cache)

    async def encode(self, found: faces.Faces, fusion: str, tenant: str = "") -> identity.Identity:
        """The identity of one person; `tenant`: whose identities may be used again."""
        return await self._run(self._stage.encode, found, fusion, tenant)


class TextEncoder(CachedReplica):
    """pipeline.text.TextEncoder as a deployment."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = text.TextEncoder.load) -> None:
        self._stage: text.TextEncoder = load(settings)
        super().__init__(settings, "text", self._stage.cache)

    async def encode(self, prompt: str, length: int) -> text.Text:
        """A prompt for FLUX."""
        return await self._run(self._stage.encode, prompt, length)

"""The stages as replicas: each loads its plain class from pipeline/, and runs calls of it in threads."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from deployments.problems import unforeseen
from pipeline import denoise, faces, identity, text
from pipeline.errors import Fault, PipelineError
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.request import Person, Request

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
            except PipelineError as error:
                self._failures = self._failures + 1 if isinstance(error, Fault) else 0
                raise
            except Exception as error:  # logged, and told by an id: its own words may quote a prompt
                self._failures += 1
                raise unforeseen(error, type(self).__name__) from None
            finally:
                del self._running[work]
            self._failures = 0
            return result


async def _ended(work: "asyncio.Future[Any]") -> None:
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            continue  # both Serve and the ingress cancel; the thread is still running
    if not work.cancelled():
        work.exception()  # looked at, or asyncio would complain that nobody did


class FaceDetector(Replica):
    """pipeline.faces.FaceDetector as a deployment."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = faces.FaceDetector.load) -> None:
        super().__init__(settings, FACES_AT_ONCE)
        self._stage: faces.FaceDetector = load(settings)

    async def detect(self, person: "Person", index: int) -> faces.Faces:
        """The faces of people[index]."""
        stop = threading.Event()
        return await self._run(partial(self._stage.detect, person, index, cancelled=stop.is_set), stop=stop)


class IdentityEncoder(Replica):
    """pipeline.identity.IdentityEncoder as a deployment."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = identity.IdentityEncoder.load) -> None:
        super().__init__(settings)
        self._stage: identity.IdentityEncoder = load(settings)

    async def encode(self, found: faces.Faces, fusion: str) -> identity.Identity:
        """The identity of one person."""
        return await self._run(self._stage.encode, found, fusion)


class TextEncoder(Replica):
    """pipeline.text.TextEncoder as a deployment."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = text.TextEncoder.load) -> None:
        super().__init__(settings)
        self._stage: text.TextEncoder = load(settings)

    async def encode(self, prompt: str, length: int) -> text.Text:
        """A prompt for FLUX."""
        return await self._run(self._stage.encode, prompt, length)


class FluxDenoiser(Replica):
    """pipeline.denoise.FluxDenoiser as a deployment; a cancelled request frees it within one step."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = denoise.FluxDenoiser.load) -> None:
        super().__init__(settings)
        self._stage: denoise.FluxDenoiser = load(settings)

    async def denoise(
        self,
        request: "Request",
        number: int,
        prompt: text.Text,
        negative: text.Text | None,
        *identities: identity.Identity,
    ) -> denoise.Picture:
        """Picture `number` of a request."""
        stop = threading.Event()
        call = partial(self._stage.denoise, request, number, prompt, negative, *identities, cancelled=stop.is_set)
        return await self._run(call, stop=stop)

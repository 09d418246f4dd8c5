"""The stages as replicas: each loads its plain class from pipeline/, and runs one call of it at a time in a thread."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from deployments.problems import unforeseen
from pipeline import denoise, faces, identity, text
from pipeline.errors import PipelineError
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.request import Person, Request

R = TypeVar("R")
FAILURES = 3  # unforeseen ones in a row, after which a replica is replaced: after a CUDA error no call works any more
IDENTITY_BATCH = 8  # people, from any requests, that share one pass through the encoder


class Replica:
    """What the replicas of all stages have in common."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._failures = 0  # the replica's own health; nothing of a request

    def check_health(self) -> None:
        """Asked by Serve; raises where this replica should be replaced."""
        if self._failures >= FAILURES:
            raise RuntimeError(f"{type(self).__name__}: {self._failures} calls in a row failed in unforeseen ways")

    async def _run(self, call: Callable[..., R], *args: Any, stop: threading.Event | None = None) -> R:
        """One call in a thread. When cancelled, `stop` is set, and the replica is not free before the thread ends."""
        async with self._turn:
            work = asyncio.ensure_future(asyncio.to_thread(call, *args))
            try:
                result = await asyncio.shield(work)
            except asyncio.CancelledError:
                if stop is not None:
                    stop.set()
                await _ended(work)
                raise
            except PipelineError:
                self._failures = 0
                raise
            except Exception as error:  # logged, and told by an id: its own words may quote a prompt
                self._failures += 1
                raise unforeseen(error, type(self).__name__) from None
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
        super().__init__()
        self._stage: faces.FaceDetector = load(settings)

    async def detect(self, person: "Person", index: int) -> faces.Faces:
        """The faces of people[index]."""
        return await self._run(self._stage.detect, person, index)


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A person in the queue of an IdentityEncoder, and where the answer goes."""

    person: tuple[faces.Faces, str]
    answer: "asyncio.Future[identity.Identity | PipelineError]"


class IdentityEncoder(Replica):
    """pipeline.identity.IdentityEncoder as a deployment; whoever waits when a pass begins shares it.

    Not `serve.batch`: that waits for company even when idle, computes for callers that have left, and needs a cluster.
    """

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = identity.IdentityEncoder.load) -> None:
        super().__init__()
        self._stage: identity.IdentityEncoder = load(settings)
        self._queue: deque[Waiting] = deque()
        self._passes: set[asyncio.Task[None]] = set()  # asyncio itself keeps no strong reference to a task

    async def encode(self, found: faces.Faces, fusion: str) -> identity.Identity:
        """The identity of one person."""
        waiting = Waiting((found, fusion), asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if not self._passes:
            task = asyncio.ensure_future(self._work_off())
            self._passes.add(task)
            task.add_done_callback(self._passes.discard)
        result = await waiting.answer
        if isinstance(result, PipelineError):  # in a slot of its own: raised in the pass it would fail everybody in it
            raise result
        return result

    async def _work_off(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(IDENTITY_BATCH, len(self._queue)))]
            batch = [waiting for waiting in batch if not waiting.answer.done()]  # some have left meanwhile
            if not batch:
                continue
            try:
                results = await self._run(self._stage.encode_batch, [waiting.person for waiting in batch])
            except PipelineError as error:
                results = [error] * len(batch)
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(result)


class TextEncoder(Replica):
    """pipeline.text.TextEncoder as a deployment."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = text.TextEncoder.load) -> None:
        super().__init__()
        self._stage: text.TextEncoder = load(settings)

    async def encode(self, prompt: str, length: int) -> text.Text:
        """A prompt for FLUX."""
        return await self._run(self._stage.encode, prompt, length)


class FluxDenoiser(Replica):
    """pipeline.denoise.FluxDenoiser as a deployment; a cancelled request frees it within one step."""

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = denoise.FluxDenoiser.load) -> None:
        super().__init__()
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

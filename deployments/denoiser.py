"""FluxDenoiser as a deployment: an engine that steps while the event loop takes requests in and events out."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from deployments.metrics import EngineGauges
from deployments.problems import unforeseen
from deployments.stages import Replica
from pipeline import denoise
from pipeline.drawing import Work
from pipeline.engine import Engine
from pipeline.errors import PipelineError, WorkerUnavailable
from pipeline.events import Done, Event, Failed, last
from pipeline.picture import Picture
from pipeline.schedule import Ticket
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.identity import Identity
    from pipeline.request import Request
    from pipeline.text import Text


COMPILING = 10  # times engine.step_seconds, which a step may take while torch.compile works


class Driver:
    """A thread that takes turns of the engine, whenever it is woken and for as long as there are any."""

    def __init__(
        self, turn: Callable[[], bool], after: Callable[[], None], ended: Callable[[BaseException], None]
    ) -> None:
        """On the event loop `after` every turn, and `ended` with what stopped the thread for good."""
        self._turn, self._after, self._ended = turn, after, ended
        self._wanted, self._thread = asyncio.Event(), ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None
        self._began: float | None = None

    def wake(self) -> None:
        """There may be something to do; to be called on the event loop."""
        self._wanted.set()
        if self._task is None:
            self._task = asyncio.ensure_future(self._drive())
            self._task.add_done_callback(self._stop)

    @property
    def stopped(self) -> bool:
        """Whether it takes no turns any more."""
        return self._task is not None and self._task.done()

    def seconds(self) -> float:
        """How long the turn that is under way has been; 0 where none is."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            more = True
            while more:
                self._began = time.monotonic()
                more = await loop.run_in_executor(self._thread, self._turn)
                self._began = None
                self._after()

    def _stop(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._ended(error)


class FluxDenoiser(Replica):
    """Many pictures at once; a cancelled request leaves within one step.

    One thread steps and another decodes what is drawn, so that neither waits for the other nor holds up the event loop.
    """

    def __init__(self, settings: Settings, load: Callable[[Settings], Any] = denoise.FluxDenoiser.load) -> None:
        super().__init__(settings)
        self._stage: denoise.FluxDenoiser = load(settings)
        self._engine: Engine = self._stage.engine()
        self._gauges = EngineGauges(self._engine)
        self._seconds, self._step_seconds = settings.limits.request_seconds, settings.engine.step_seconds
        self._steps = Driver(self._engine.step, self._stepped, self._lost)
        self._finishes = Driver(self._engine.finish, self._gauges.tell, self._lost)
        self._listening: set[asyncio.Queue[Event]] = set()  # one for each picture that has not ended

    def check_health(self) -> None:
        """Asked by Serve; whatever hangs or has stopped makes this replica unhealthy.

        Serve asks every few seconds, so that no folded identity outlives its time where no picture is asked for.
        """
        self._stage.purge()
        self._gauges.tell()
        super().check_health()
        self._stage.check()
        idle = self._stage.compiler_idle_seconds()
        for name, driver in (("step", self._steps), ("decoding", self._finishes)):
            if driver.stopped:
                raise RuntimeError("FluxDenoiser: the engine has stopped")
            seconds = driver.seconds()
            # a step that compiles hangs only where it neither goes on to compile nor ends
            if seconds > COMPILING * self._step_seconds or min(seconds, idle) > self._step_seconds:
                raise RuntimeError(f"FluxDenoiser: a {name} takes longer than {self._step_seconds:g} seconds")

    async def denoise(
        self,
        request: "Request",
        number: int,
        prompt: "Text",
        negative: "Text | None",
        *identities: "Identity",
        expires: float | None = None,
    ) -> Picture:
        """Picture `number` of a request, for whom does not watch: an answer costs less than a stream.

        `expires`: seconds since 1970, as the ingress has stamped the request; None: the request's own time, from now.
        """
        work = Work(request, number, prompt, negative, identities)
        async with aclosing(self._events(work, expires, previews=False)) as events:
            picture: Picture = await last(events)
        return picture

    async def watch(
        self,
        request: "Request",
        number: int,
        prompt: "Text",
        negative: "Text | None",
        *identities: "Identity",
        expires: float | None = None,
    ) -> AsyncGenerator[Event]:
        """The events of picture `number` of a request, the last of which is Done; raises what it failed with."""
        work = Work(request, number, prompt, negative, identities)
        async with aclosing(self._events(work, expires, previews=True)) as events:
            async for event in events:
                yield event

    async def _events(self, work: Work, expires: float | None, previews: bool) -> AsyncGenerator[Event]:
        loop, events, request = asyncio.get_running_loop(), asyncio.Queue[Event](), work.request
        seconds = min(self._seconds, request.deadline_seconds or self._seconds)
        if expires is not None:
            seconds = expires - time.time()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self._submit(work, listen, seconds, previews)
        self._listening.add(events)
        self._steps.wake()
        try:
            while True:
                event = await events.get()
                if isinstance(event, Failed):
                    raise self._failed(event.error) from None
                yield event
                if isinstance(event, Done):
                    self._failures = 0
                    return
        finally:
            self._listening.remove(events)
            self._engine.cancel(ticket)  # nothing where it has ended; else the caller went away
            self._steps.wake()

    def _submit(self, work: Work, listen: Callable[[Event], None], seconds: float, previews: bool) -> Ticket:
        if self._steps.stopped or self._finishes.stopped:
            raise WorkerUnavailable("This denoiser has stopped and is being replaced; send the request again.")
        try:
            return self._engine.submit(work, listen, work.request.priority, seconds, previews)
        except PipelineError:  # refused, which says nothing of this replica's health
            raise
        except Exception as error:
            raise self._failed(error) from None

    def _stepped(self) -> None:
        self._gauges.tell()
        if self._engine.has_drawn:
            self._finishes.wake()

    def _lost(self, error: BaseException) -> None:
        """A thread of the engine has stopped: no picture in it will ever end by itself."""
        told = unforeseen(error, "the engine of a FluxDenoiser")
        for events in self._listening:
            events.put_nowait(Failed(told))

"""FluxDenoiser as a deployment: an engine that steps while the event loop takes requests in and events out."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from deployments.metrics import EngineGauges
from deployments.stages import Replica
from pipeline import denoise
from pipeline.drawing import Work
from pipeline.engine import Engine
from pipeline.events import Done, Event, Failed, last
from pipeline.picture import Picture
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.identity import Identity
    from pipeline.request import Request
    from pipeline.text import Text


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
        self._submitted, self._drawn = asyncio.Event(), asyncio.Event()
        self._drivers: list[asyncio.Task[None]] = []

    def check_health(self) -> None:
        """Asked by Serve; a step that hangs, or an engine that no longer runs, makes this replica unhealthy.

        Serve asks every few seconds, so that no folded identity outlives its time where no picture is asked for.
        """
        self._stage.purge()
        super().check_health()
        if self._engine.stepping_seconds() > self._step_seconds:
            raise RuntimeError(f"FluxDenoiser: a step takes longer than {self._step_seconds:g} seconds")
        if any(driver.done() for driver in self._drivers):
            raise RuntimeError("FluxDenoiser: the engine has stopped")

    async def denoise(
        self,
        request: "Request",
        number: int,
        prompt: "Text",
        negative: "Text | None",
        *identities: "Identity",
    ) -> Picture:
        """Picture `number` of a request, for whom does not watch: an answer costs less than a stream."""
        work = Work(request, number, prompt, negative, identities)
        async with aclosing(self._events(work, previews=False)) as events:
            picture: Picture = await last(events)
        return picture

    async def watch(
        self,
        request: "Request",
        number: int,
        prompt: "Text",
        negative: "Text | None",
        *identities: "Identity",
    ) -> AsyncGenerator[Event]:
        """The events of picture `number` of a request, the last of which is Done; raises what it failed with."""
        work = Work(request, number, prompt, negative, identities)
        async with aclosing(self._events(work, previews=True)) as events:
            async for event in events:
                yield event

    async def _events(self, work: Work, previews: bool) -> AsyncGenerator[Event]:
        self._start()
        loop, events, request = asyncio.get_running_loop(), asyncio.Queue[Event](), work.request
        seconds = min(self._seconds, request.deadline_seconds or self._seconds)

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self._engine.submit(work, listen, request.priority, seconds, previews)
        self._submitted.set()
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
            self._engine.cancel(ticket)  # nothing where it has ended; else the caller went away
            self._submitted.set()
            self._gauges.tell()

    def _start(self) -> None:
        if not self._drivers:  # not in __init__, which knows no event loop
            steps = self._drive(self._engine.step, self._submitted, self._wake_finisher)
            finishes = self._drive(self._engine.finish, self._drawn, lambda: None)
            self._drivers = [asyncio.ensure_future(steps), asyncio.ensure_future(finishes)]

    def _wake_finisher(self) -> None:
        if self._engine.has_drawn:
            self._drawn.set()

    async def _drive(self, turn: Callable[[], bool], wanted: asyncio.Event, after: Callable[[], None]) -> None:
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        while True:
            await wanted.wait()
            wanted.clear()
            while await loop.run_in_executor(thread, turn):
                after()
            after()

"""Watch: jobs of the service, several at once, as one stream of what happens to them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from cluster.client import Client, JobEvent
from deployments.problems import unforeseen
from pipeline.errors import PipelineError

Happening = JobEvent | PipelineError  # an error is the last of its job
ACCEPTED = "accepted"  # the first event of each job, with the job as its data


class Watch:
    """Submits requests when it is entered. Whoever leaves it before they end cancels what is open."""

    def __init__(self, client: Client, bodies: Sequence[Mapping[str, Any]]) -> None:
        """`bodies`: the JSON of POST /v1/images each; from the event loop that will ask for the news."""
        self._client, self._bodies = client, bodies
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Happening]]()
        self._left, self._ids, self._gone = set(range(len(bodies))), dict[int, str](), threading.Event()

    def __enter__(self) -> Self:
        for index in self._left:
            begin(self._follow, index)  # a thread of its own: it waits for as long as its job takes
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._gone.set()
        for index in self._left & self._ids.keys():
            begin(stop, self._client, self._ids[index])

    async def news(self) -> AsyncIterator[tuple[int, Happening]]:
        """What happens to the jobs, each by its index, until all have ended."""
        while self._left:
            index, what = await self._news.get()
            if isinstance(what, PipelineError) or what.ends:
                self._left.discard(index)
            yield index, what

    def _follow(self, index: int) -> None:
        try:
            job = self._client.submit(self._bodies[index])
            self._ids[index] = job["id"]
            if self._gone.is_set():  # whoever left could not know of it
                self._client.cancel(job["id"])
                return
            self._tell(index, JobEvent(ACCEPTED, job))
            for event in self._client.follow(job["id"]):
                self._tell(index, event)
        except PipelineError as error:
            self._tell(index, error)
        except Exception as error:  # or it would be waited for without end
            self._tell(index, unforeseen(error, "the Studio"))

    def _tell(self, index: int, what: Happening) -> None:
        if not self._gone.is_set():
            self._loop.call_soon_threadsafe(self._news.put_nowait, (index, what))


def stop(client: Client, job_id: str) -> PipelineError | None:
    """Cancel a job; returns what kept the service from it, if anything did."""
    try:
        client.cancel(job_id)
    except PipelineError as error:
        return error
    return None


def begin(work: Callable[..., object], *args: Any) -> None:
    """Do something in a thread that nobody waits for."""
    threading.Thread(target=work, args=args, daemon=True).start()

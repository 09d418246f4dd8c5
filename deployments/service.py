"""Service: what the HTTP API serves. The ingress is one; tests have their own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import fastapi

from deployments.identities import Identities
from deployments.keys import Caller
from deployments.lease import AWAY
from pipeline.errors import StoreUnavailable
from pipeline.events import Event
from pipeline.progress import Position, ServerEvent
from pipeline.request import Request
from pipeline.stored import Content, Stored
from pipeline.uploads import UploadStore

T = TypeVar("T")
READ_SECONDS = 30  # more than the store's own tries of one call take
Progress = Callable[[int, Event], None]


class JobService(Protocol):
    """Work that goes on without its caller. See deployments.jobs.Jobs."""

    def open_jobs(self, tenant: str) -> int:
        """A tenant's jobs that are queued or running."""

    async def submit(
        self,
        request: Request,
        tenant: str,
        idempotency_key: str | None,
        origin: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Any], bool]:
        """Accept a request; its job, and whether its Idempotency-Key had been used for it before.

        `origin`: JSON values of the foreign API by which it came, which views of the job then have.
        """

    async def view(self, tenant: str, job_id: str) -> dict[str, Any]:
        """A job or image of a tenant's; raises ImageNotFound."""

    async def wait(self, tenant: str, job_id: str, seconds: float) -> dict[str, Any]:
        """The same when it has ended, or as it is after so many seconds."""

    def follow(self, tenant: str, job_id: str, after: Position) -> AsyncIterator[ServerEvent | None]:
        """Its events beyond a position; None where there is nothing to tell for a while."""

    async def cancel(self, tenant: str, job_id: str) -> dict[str, Any]:
        """Stop it."""

    async def erase(self, tenant: str, job_id: str) -> None:
        """Remove it, with all that belongs to it."""


class Service(Protocol):
    """What the API serves; each method raises PipelineError."""

    @property
    def jobs(self) -> JobService:
        """Work that goes on without its caller."""

    @property
    def identities(self) -> Identities:
        """People who are stored."""

    @property
    def uploads(self) -> UploadStore:
        """Photos that are sent ahead of the requests that name them."""

    async def generate(self, request: Request, tenant: str = "", progress: Progress | None = None) -> Stored:
        """Make the pictures of a request and store them; cancelling it stops the work."""

    async def content(self, image_id: str, number: int, tenant: str = "") -> Content:
        """A stored picture, or a link to it."""

    async def data(self, image_id: str, number: int, tenant: str = "") -> bytes:
        """A stored picture's bytes, wherever they are kept."""

    async def health(self) -> Mapping[str, Any]:
        """What is running; raises where no picture could be made now."""

    def models(self) -> Mapping[str, Any]:
        """The models in use, with licences."""


async def prompt_answer(answer: Awaitable[T], silent: str) -> T:
    """What is read rather than made, within READ_SECONDS; raises StoreUnavailable."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await answer
    except TimeoutError as error:
        raise StoreUnavailable(f"{silent} did not answer within {READ_SECONDS} seconds; try again.") from error


def lasting(request: Request, idempotency_key: str | None) -> bool:
    """Whether a caller who has not heard of a job can still come to know of it, so that it goes on without them."""
    return idempotency_key is not None or request.webhook is not None


async def waited(jobs: JobService, tenant: str, view: dict[str, Any], seconds: float, kept: bool) -> dict[str, Any]:
    """A job when it has ended, or as it is after so many seconds; a caller who leaves stops it, unless it is `kept`.

    view: what is known of it. It was accepted, so a store that is away meanwhile is no error.
    """
    try:
        return await jobs.wait(tenant, view["id"], seconds)
    except AWAY:
        return view
    except asyncio.CancelledError:
        if not kept:
            await asyncio.shield(asyncio.ensure_future(jobs.cancel(tenant, view["id"])))
        raise


def caller(http: fastapi.Request) -> Caller:
    """Whose request this is; without keys, nobody's in particular."""
    found: Caller = getattr(http.state, "caller", None) or Caller()
    return found

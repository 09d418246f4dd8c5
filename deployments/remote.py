"""The other deployments as the ingress calls them, and what their failures mean."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from deployments.board import News, Step
from deployments.problems import unforeseen
from pipeline.errors import Overloaded, PipelineError, WorkerUnavailable
from pipeline.faces import Faces
from pipeline.flow import Stages
from pipeline.identity import Identity
from pipeline.progress import Position, ServerEvent
from pipeline.request import Person

BOARD_SECONDS = 2.0  # for the board to answer, beyond what it was asked to wait
Handle = DeploymentHandle[Any]
Response = DeploymentResponse[Any] | DeploymentResponseGenerator[Any]


class Remote:
    """The stages, each in a deployment of its own."""

    def __init__(self, handles: Mapping[str, Handle]) -> None:
        """`handles` by the names of the deployments."""
        self._handles = dict(handles)
        self._watching = self._handles["FluxDenoiser"].options(stream=True).watch

    @property
    def names(self) -> tuple[str, ...]:
        """The deployments without which there are no pictures."""
        return tuple(self._handles)

    @contextmanager
    def calls(self, stored: Callable[[str, str], Identity], watching: bool) -> Iterator[Stages]:
        """Stages for one request; `stored` are its stored identities, `watching` makes pictures come as events.

        When what is done with them fails or is cancelled, every call is cancelled. Raises PipelineError.
        """
        started: list[Response] = []

        def remote(handle: Any) -> Callable[..., Response]:
            def call(*arguments: Any, **named: Any) -> Response:
                started.append(handle.remote(*arguments, **named))
                return started[-1]

            return call

        denoise = self._watching if watching else self._handles["FluxDenoiser"].denoise
        try:
            yield Stages(
                faces=remote(self._handles["FaceDetector"].detect),
                identity=remote(self._handles["IdentityEncoder"].encode),
                text=remote(self._handles["TextEncoder"].encode),
                denoise=remote(denoise),
                stored=stored,
            )
        except BaseException as error:
            for response in started:
                with suppress(Exception):  # one that failed before it reached a replica raises its error here again
                    response.cancel()  # type: ignore[no-untyped-call]
            if isinstance(error, Exception):
                raise told(error) from None  # Ray's own text would bring a remote traceback along
            raise

    async def read_faces(self, person: Person, tenant: str) -> Faces:
        """The faces in a person's photos; raises PipelineError."""
        faces: Faces = await self._answer(self._handles["FaceDetector"].detect.remote(person, 0, tenant))
        return faces

    async def encode(self, faces: Faces, fusion: str, tenant: str) -> Identity:
        """The identity of one person; raises PipelineError."""
        identity: Identity = await self._answer(self._handles["IdentityEncoder"].encode.remote(faces, fusion, tenant))
        return identity

    async def _answer(self, response: Any) -> Any:
        try:
            return await response
        except BaseException as error:
            with suppress(Exception):  # where it has failed there is nothing to stop
                response.cancel()
            if isinstance(error, Exception):
                raise told(error) from None
            raise


class RemoteBoard:
    """The board, in a deployment of its own. Every call raises whatever keeps it from being answered in time."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def publish(self, job_id: str, attempt: int, first: int, events: Sequence[ServerEvent]) -> int:
        """See deployments.board.Board, as for the others."""
        known: int = await _within(0.0, self._handle.publish.remote(job_id, attempt, first, list(events)))
        return known

    async def after(self, job_id: str, position: Position, seconds: float) -> list[ServerEvent]:
        """See Board."""
        events: list[ServerEvent] = await _within(seconds, self._handle.after.remote(job_id, position, seconds))
        return events

    async def steps(self) -> Mapping[str, Step]:
        """See Board."""
        steps: Mapping[str, Step] = await _within(0.0, self._handle.steps.remote())
        return steps

    async def end(self, job_id: str, name: str, data: Mapping[str, Any]) -> None:
        """See Board."""
        await _within(0.0, self._handle.end.remote(job_id, name, data))

    async def notify(self, kind: str, job_id: str) -> None:
        """See Board."""
        await _within(0.0, self._handle.notify.remote(kind, job_id))

    async def notices(self, board: str, after: int, seconds: float) -> News:
        """See Board."""
        news: News = await _within(seconds, self._handle.notices.remote(board, after, seconds))
        return news


async def _within(seconds: float, response: Any) -> Any:
    """An answer of the board; while there is none to ask, Serve would keep the call until there is."""
    try:
        async with asyncio.timeout(seconds + BOARD_SECONDS):
            return await response
    except BaseException:  # also where the caller waits no longer
        with suppress(Exception):  # where it has failed there is nothing to stop
            response.cancel()
        raise


def running_replicas() -> dict[str, int]:
    """How many replicas of each deployment can take requests now; one call to Serve's controller."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return {
        name: sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
        for name, deployment in application.deployments.items()
    }


def told(error: BaseException) -> PipelineError:
    """What a failure of a remote call means for the caller.

    An error arrives wrapped once for each replica that it crossed, and only its innermost cause has its own words.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RayTaskError):
            inner = inner.cause
        elif isinstance(inner, PipelineError):
            return inner
        elif isinstance(inner, BackPressureError):
            return Overloaded("The service has all the work it can queue; try again after the time in Retry-After.")
        elif isinstance(inner, RayError | DeploymentUnavailableError | ReplicaUnavailableError):
            return WorkerUnavailable("A worker was lost or is not there yet; send the request again.")
        else:
            inner = inner.__cause__
    return unforeseen(error, "Ingress")

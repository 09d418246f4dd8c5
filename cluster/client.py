"""Client: this service over HTTP, from wherever. docs/api.md has the routes."""

import base64
import json
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from cluster.sse import Event, events
from deployments.problems import leaves
from pipeline.errors import BadInput, Busy, Fault, InvalidRequest, KeyInvalid, PipelineError, WorkerUnavailable
from pipeline.jobs import ENDS

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the further tries of what may be sent again
LONGEST_PAUSE = 60.0  # what a service may ask to wait; where it asks for more, nothing is tried again
TIMES = httpx.Timeout(60.0, connect=10.0)  # of silence: a stream of events says something every 15 seconds
FACE_WORK = httpx.Timeout(330.0, connect=10.0)  # an identity is answered when it is made


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job: queued, started, step, preview, succeeded, failed or cancelled."""

    name: str
    data: Mapping[str, Any]

    @property
    def ends(self) -> bool:
        """Whether none follows."""
        return self.name in ENDS


class Client:
    """Everything raises PipelineError: what the service tells, or WorkerUnavailable where it does not answer."""

    def __init__(self, base_url: str, key: str = "", pause: Callable[[float], None] = time.sleep) -> None:
        """Raises InvalidRequest and KeyInvalid for what can be no address and no API key; `pause` waits seconds."""
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise KeyInvalid("This is no API key; a key is one line of visible characters.")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._answered = False  # whether the service has ever done so
        hooks = {"response": [self._heard]}
        self._http = httpx.Client(base_url=_address(base_url), headers=headers, timeout=TIMES, event_hooks=hooks)
        self._pause = pause

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, request: Mapping[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        """Have a request (the JSON of POST /v1/images) made into a job; returns the job.

        It is sent again where that may help; as it goes under an Idempotency-Key, it is carried out once.
        """
        headers = {"Prefer": "respond-async", "Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return _object(self._send("POST", "/v1/images", again=True, json=request, headers=headers))

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as it is now."""
        return _object(self._send("GET", f"/v1/images/{job_id}", again=True))

    def follow(self, job_id: str) -> Generator[JobEvent]:
        """What happens to a job, from its beginning to its end, each event once and in order.

        Where the connection breaks off it goes on after the last event that came, if the service is back in time.
        """
        patience, last = _Patience(self._pause), ""
        while True:
            try:
                for event in self._stream(job_id, last):
                    patience.renew()
                    last, found = event.id, JobEvent(event.name, _parsed(event.data))
                    yield found
                    if found.ends:
                        return
            except _Again as failure:
                patience.wait(failure)

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop a job; returns it. One that has ended stays as it is."""
        return _object(self._send("POST", f"/v1/images/{job_id}/cancel", again=True))

    def picture(self, job_id: str, number: int) -> bytes:
        """The bytes of a picture, from wherever the service keeps it."""
        # httpx takes the key off where a redirect leads to another host
        return self._send("GET", f"/v1/images/{job_id}/{number}", again=True, follow_redirects=True).content

    def add_identity(self, photos: Sequence[bytes], **fields: Any) -> dict[str, Any]:
        """Store a person; `fields`: the other fields of POST /v1/identities. Returns the identity."""
        body = {"photos": [base64.b64encode(photo).decode() for photo in photos], **fields}
        return _object(self._send("POST", "/v1/identities", again=False, json=body, timeout=FACE_WORK))

    def identities(self) -> list[dict[str, Any]]:
        """The caller's stored identities, the newest first."""
        found: list[dict[str, Any]] = _object(self._send("GET", "/v1/identities", again=True))["identities"]
        return found

    def models(self) -> dict[str, Any]:
        """Which models the service draws with."""
        return _object(self._send("GET", "/v1/models", again=True))

    def remove_identity(self, identity_id: str) -> None:
        """Erase a stored identity."""
        self._send("DELETE", f"/v1/identities/{quote(identity_id, safe='')}", again=False)

    def _send(self, method: str, path: str, *, again: bool, **options: Any) -> httpx.Response:
        patience = _Patience(self._pause)
        while True:
            try:
                with self._answers():
                    return _successful(self._http.request(method, path, **options))
            except _Again as failure:
                if not again:
                    raise failure.error from failure
                patience.wait(failure)

    def _stream(self, job_id: str, last: str) -> Iterator[Event]:
        """The events after the one with the id `last`; raises _Again where their stream ends."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
        asked = 0.0
        with self._answers(), self._http.stream("GET", f"/v1/images/{job_id}/events", headers=headers) as response:
            if not response.is_success:
                response.read()
            for event in events(_successful(response).iter_bytes(), last):
                asked = (event.retry or 0) / 1000
                yield event
        raise _Again(self._lost(), asked)

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """A service that is not there at all is told at once; one that was may come back."""
        try:
            yield
        except httpx.TransportError as error:
            if not self._answered:
                raise self._lost() from error
            raise _Again(self._lost()) from error

    def _heard(self, _: httpx.Response) -> None:
        self._answered = True

    def _lost(self) -> WorkerUnavailable:
        return WorkerUnavailable(f"There is no service at {self._http.base_url}, or none any more; check the address.")


class _Again(Exception):
    """A failure that may pass: what to tell if it does not, and the seconds that the service asks to wait."""

    def __init__(self, error: PipelineError, seconds: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.seconds = error, seconds


class _Patience:
    """How often something is tried again, and after which pauses."""

    def __init__(self, pause: Callable[[float], None]) -> None:
        self._pause, self._failures = pause, 0

    def renew(self) -> None:
        """It has worked in between."""
        self._failures = 0

    def wait(self, failure: _Again) -> None:
        """Before the next try; raises what is to be told where there is none."""
        if self._failures == len(PAUSES) or failure.seconds > LONGEST_PAUSE:
            raise failure.error from failure
        self._pause(max(PAUSES[self._failures], failure.seconds))
        self._failures += 1


def told(problem: Mapping[str, Any], status: int) -> PipelineError:
    """A problem of the service as the error that it was there; raises KeyError, TypeError for what is no problem."""
    kinds = {kind.code: kind for kind in leaves()}
    other = BadInput if status < 500 else Fault  # of a service that knows more errors than this client
    return kinds.get(problem["code"], other)(str(problem["detail"]))


def _successful(response: httpx.Response) -> httpx.Response:
    """The answer itself if it is a good one; else raises _Again or PipelineError."""
    if response.is_success:
        return response
    status = response.status_code
    try:
        error = told(response.json(), status)
    except (ValueError, KeyError, TypeError):
        where = f"{response.url.scheme}://{response.url.netloc.decode()}"
        unknown = f"{where} answered {status}, and not as this service does; check the address."
        error = WorkerUnavailable(unknown) if status >= 500 else BadInput(unknown)
    if isinstance(error, Busy):
        raise _Again(error, _seconds(response.headers.get("retry-after", "")))
    raise error


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isascii() and retry_after.isdecimal() else 0.0


def _object(response: httpx.Response) -> dict[str, Any]:
    return _parsed(response.text)


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadInput("What answers is not this service, or another version of it; check the address.")
    return value


def _address(text: str) -> httpx.URL:
    """An address as it can be connected to; raises InvalidRequest."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise InvalidRequest("--server: give the address of the service, such as https://pulid.example.com.")
    return url

"""Errors as RFC 9457 problem details: what a caller is told, and the one line that the log keeps."""

import logging
import traceback
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import (
    Busy,
    Fault,
    InternalError,
    InvalidRequest,
    KeyInvalid,
    Overloaded,
    PipelineError,
    RateLimited,
    WorkerUnavailable,
)

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"


class FieldProblem(BaseModel):
    """What is wrong with one field."""

    field: str = Field(description="where in the body, such as people[0].id_weight")
    problem: str


class Problem(BaseModel):
    """An error, by RFC 9457."""

    type: str = Field(description="/problems/{code}: an address that explains the code")
    title: str
    status: int
    detail: str = Field(description="a sentence that says what to do")
    instance: str = Field(description="the id of this one failure, which the log has too")
    code: str = Field(description="for programs; it does not change")
    errors: list[FieldProblem] | None = Field(None, description="with invalid_request: what is wrong where")


def leaves(root: type[PipelineError] = PipelineError) -> list[type[PipelineError]]:
    """Every error that callers can meet, in the order of the tree in pipeline/errors.py."""
    return [leaf for child in root.__subclasses__() for leaf in leaves(child)] or [root]


def explain(kind: type[PipelineError]) -> dict[str, Any]:
    """What a code means, apart from any one failure."""
    return {"code": kind.code, "status": kind.status, "title": _title(kind)}


def problem(error: PipelineError, status: int | None = None) -> dict[str, Any]:
    """What a caller is told of an error; of a fault of ours only the id, which the log has too.

    `status`: in the place of the error's own, where what was asked for stands in the address.
    """
    instance = f"urn:uuid:{uuid.uuid4()}"
    detail = str(error)
    if isinstance(error, Fault):
        log.error("%s %s: %s", instance, error.code, detail)
        detail = f"This is not your doing. Try again, or tell whoever runs this service the id {instance}."
    elif isinstance(error, Busy):
        log.warning("%s %s", instance, error.code)
    told: dict[str, Any] = {
        "type": f"/problems/{error.code}",
        "title": _title(type(error)),
        "status": error.status if status is None else status,
        "detail": detail,
        "instance": instance,
        "code": error.code,
    }
    if isinstance(error, InvalidRequest) and error.fields:
        told["errors"] = [{"field": field, "problem": what} for field, what in error.fields]
    return told


def response(error: PipelineError, retry_after: int, status: int | None = None) -> JSONResponse:
    """The answer to a request that failed; `retry_after` in seconds. See problem."""
    told = problem(error, status)
    return JSONResponse(told, told["status"], answer_headers(error, retry_after), MEDIA_TYPE)


def answer_headers(error: PipelineError, retry_after: int) -> dict[str, str]:
    """The headers that belong to an error in whatever shape it is told; `retry_after` in seconds, where it has none."""
    if isinstance(error, KeyInvalid):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, RateLimited):
        return {"Retry-After": str(error.retry_after)}
    return {"Retry-After": str(retry_after)} if isinstance(error, Overloaded | WorkerUnavailable) else {}


def documented(*kinds: type[PipelineError]) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for OpenAPI."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        entry = found.setdefault(kind.status, {"description": "", "model": Problem})
        entry["description"] = f"{entry['description']} `{kind.code}`: {kind.__doc__}".strip()
    return found


def http_response(status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer to what never reaches a route: an unknown path, or a method that it does not have."""
    phrase = HTTPStatus(status).phrase
    code = phrase.lower().replace(" ", "_")
    problem = {"type": f"/problems/{code}", "title": phrase, "status": status, "code": code}
    problem["instance"] = f"urn:uuid:{uuid.uuid4()}"
    problem["detail"] = "There is nothing at this address with this method; see GET /openapi.json."
    return JSONResponse(problem, status, headers, MEDIA_TYPE)


def _title(kind: type[PipelineError]) -> str:
    kind = InternalError if kind is PipelineError else kind
    return (kind.__doc__ or kind.code).partition("\n")[0].rstrip(".")


def unforeseen(error: BaseException, where: str) -> InternalError:
    """An error that nobody foresaw, logged and made into one that can be told.

    The log gets its type and where it came from, but not its own words: they may quote a prompt.
    """
    reference = uuid.uuid4().hex[:12]
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s in %s\n%s", reference, type(error).__name__, where, frames)
    return InternalError(f"{where} failed in a way nobody foresaw; the log of that process has it under {reference}.")


class LastResort:
    """ASGI middleware: whatever escaped every handler is told like other errors, if the answer has not begun."""

    def __init__(self, app: ASGIApp, refusal: Callable[[Scope, PipelineError], Response]) -> None:
        """`refusal` makes the answer."""
        self._app, self._refusal = app, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and watch whether an answer begins."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # the one place where nothing may pass: it would quote its words in Serve's log
            told = unforeseen(error, "the HTTP layer")
            if begun or scope["type"] != "http":
                raise told from None
            await self._refusal(scope, told)(scope, receive, send)

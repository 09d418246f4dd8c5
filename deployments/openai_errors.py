"""Errors as OpenAI's API tells them, so that its SDK raises the exception that a program expects."""

from typing import Any

from fastapi.responses import JSONResponse, Response

from deployments import problems
from pipeline.errors import (
    BadInput,
    BodyTooLarge,
    DeadlineExceeded,
    FaceError,
    HostRefused,
    IdentityNotFound,
    IdentityOutdated,
    KeyInvalid,
    PhotoError,
    PipelineError,
    RateLimited,
)

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SIZES = "give auto, or WIDTHxHEIGHT with sides of 256 to 1536 pixels in steps of 16, such as 1024x1536"
NAMES = {"width": "size", "height": "size", "num_outputs": "n", "output_quality": "output_compression"}
PARAMS = {PhotoError: "image", FaceError: "image", IdentityNotFound: "identity", IdentityOutdated: "identity"}
BODY = "(body)"  # the field of what belongs to none
CODES = {KeyInvalid: "invalid_api_key", RateLimited: "rate_limit_exceeded"}  # those by which programs tell them


def speaks(path: str) -> bool:
    """Whether a path is one of OpenAI's API."""
    return path in (GENERATIONS, EDITS)


def told(error: PipelineError) -> dict[str, Any]:
    """What a caller is told of an error, in OpenAI's shape and with its names of the fields; see problems.problem."""
    problem = problems.problem(error)
    fields = [(_renamed(entry["field"]), _renamed(entry["problem"])) for entry in problem.get("errors", ())]
    message = _renamed(problem["detail"])
    if fields:
        said = dict.fromkeys(f"{name}: {SIZES if name == 'size' else what}" for name, what in fields)  # each once
        message = f"The request does not fit: {'; '.join(said)}."
    param = next((name for kind, name in PARAMS.items() if isinstance(error, kind)), None)
    if fields and fields[0][0] != BODY:
        param = fields[0][0].partition("[")[0]
    code = CODES.get(type(error), error.code)
    return {"error": {"message": message, "type": _type(error), "param": param, "code": code}}


def status(error: PipelineError) -> int:
    """By which OpenAI's SDK chooses its exception: BadRequestError for all that is wrong with a request's values."""
    if isinstance(error, BadInput) and not isinstance(error, KeyInvalid | HostRefused | BodyTooLarge):
        return 400
    return error.status


def refusal(error: PipelineError, retry_after: int) -> Response:
    """The answer to a request that failed; `retry_after` in seconds."""
    headers = problems.answer_headers(error, retry_after)
    if isinstance(error, DeadlineExceeded):
        headers["x-should-retry"] = "false"  # the SDK would have all of it computed again, twice
    return JSONResponse(told(error), status(error), headers)


def documented() -> dict[int | str, dict[str, Any]]:
    """The errors of both routes, for OpenAPI."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in problems.leaves():
        entry = found.setdefault(status(kind("")), {"description": ""})
        entry["description"] = f"{entry['description']} `{CODES.get(kind, kind.code)}`".strip()
    return found


def _type(error: PipelineError) -> str:
    if isinstance(error, BadInput):
        return "invalid_request_error"
    return "requests" if isinstance(error, RateLimited) else "server_error"


def _renamed(text: str) -> str:
    """What a Request calls its fields, as these routes name them."""
    text = text.replace("people[0].photos", "image").replace("people[0].", "").replace("people[0]", "image")
    return NAMES.get(text, text)

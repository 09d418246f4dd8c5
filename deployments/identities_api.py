"""Stored identities over HTTP: people whose photos are read once, and whom requests then name by an id.

POST   /v1/identities         photos become an identity: JSON, or multipart/form-data with files
GET    /v1/identities         the caller's own, the newest first
GET    /v1/identities/{id}    one of them
DELETE /v1/identities/{id}    erases it
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from deployments import problems
from deployments.admission import Admission
from deployments.answers import UsedFace
from deployments.body import read, record
from deployments.identities import Identities
from deployments.making import in_time
from deployments.multipart import Part, is_multipart, read_form
from deployments.service import caller, prompt_answer
from pipeline.errors import IdentityNotFound, MalformedBody, StoreUnavailable
from pipeline.request import NewIdentity
from pipeline.settings import LimitSettings

ADDRESS = "/v1/identities"
STORE = "The store"


class IdentityAnswer(BaseModel):
    """A stored identity, as its owner sees it."""

    id: str = Field(description="to name it by in people[i].identity")
    name: str | None
    created: str
    expires: str = Field(description="when it is erased")
    fusion: str
    faces: list[UsedFace]
    similarity: list[list[float]] = Field(description="cosine of each two faces' ArcFace embeddings; 1: the same")
    photos_kept: bool


class IdentityList(BaseModel):
    """All stored identities of a caller."""

    identities: list[IdentityAnswer] = Field(description="the newest first")


async def read_new(headers: Mapping[str, str], chunks: AsyncIterator[bytes], max_bytes: int) -> NewIdentity:
    """The body of POST /v1/identities, in either form.

    Raises UnsupportedContentType, BodyTooLarge, MalformedBody, InvalidRequest.
    """
    if not is_multipart(headers):
        return await read(NewIdentity, headers, chunks, max_bytes)
    parts = await read_form(headers, chunks, max_bytes)
    return await asyncio.to_thread(lambda: record(NewIdentity, _values(parts)))


def _values(parts: list[Part]) -> dict[str, Any]:
    """The parts of a form as the JSON values that they stand for; raises MalformedBody."""
    values: dict[str, Any] = {}
    for name, content in parts:
        if isinstance(content, bytes):
            content = base64.b64encode(content).decode()
        if name == "photos":
            values.setdefault(name, []).append(content)
        elif name in values:
            raise MalformedBody("The body names one field twice; say it once.")
        else:
            values[name] = _value(name, content)
    return values


def _value(name: str, text: str) -> Any:
    """A form knows only text; what is no number stays one, and is refused where a number is needed."""
    if name == "face" and text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    if name == "keep_photos":
        return {"true": True, "false": False}.get(text, text)
    if name == "seconds":
        try:
            return float(text)
        except ValueError:
            return text
    return text


def router(identities: Identities, admission: Admission, limits: LimitSettings) -> fastapi.APIRouter:
    """The routes below /v1/identities."""
    routes = fastapi.APIRouter()

    @routes.post(
        ADDRESS,
        status_code=201,
        response_model=IdentityAnswer,
        responses=problems.documented(*problems.leaves()),
        openapi_extra={"requestBody": _body()},
    )
    async def add(http: fastapi.Request) -> Response:
        """Store a person. The photos are read once; a request then names the identity in their place."""
        async with in_time(limits):
            with admission.admitted(caller(http)):
                new = await read_new(http.headers, http.stream(), limits.max_body_bytes)
                answer = await identities.add(new, caller(http).tenant)
        return JSONResponse(answer, 201, {"Location": f"{ADDRESS}/{answer['id']}"})

    @routes.get(ADDRESS, response_model=IdentityList, responses=problems.documented(StoreUnavailable))
    async def every(http: fastapi.Request) -> Response:
        """The caller's identities, the newest first."""
        return JSONResponse({"identities": await prompt_answer(identities.all(caller(http).tenant), STORE)})

    @routes.get(f"{ADDRESS}/{{identity_id}}", response_model=IdentityAnswer, responses=_missing())
    async def one(identity_id: str, http: fastapi.Request) -> Response:
        """One of the caller's identities."""
        try:
            return JSONResponse(await prompt_answer(identities.one(identity_id, caller(http).tenant), STORE))
        except IdentityNotFound as error:
            return problems.response(error, limits.retry_after_seconds, status=404)

    @routes.delete(f"{ADDRESS}/{{identity_id}}", status_code=204, responses=_missing())
    async def erase(identity_id: str, http: fastapi.Request) -> Response:
        """Erase an identity, and the photos that were kept with it."""
        try:
            await prompt_answer(identities.delete(identity_id, caller(http).tenant), STORE)
        except IdentityNotFound as error:
            return problems.response(error, limits.retry_after_seconds, status=404)
        return Response(status_code=204)

    return routes


def _missing() -> dict[int | str, dict[str, Any]]:
    return {404: {"description": f"`{IdentityNotFound.code}`", "model": problems.Problem}}


def _body() -> dict[str, Any]:
    schema = NewIdentity.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # Photo is among those of Request
    fields: dict[str, Any] = {name: {"type": "string"} for name in NewIdentity.model_fields}
    fields["photos"] = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"type": "object", "required": ["photos"], "properties": fields}
    return {
        "required": True,
        "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
    }

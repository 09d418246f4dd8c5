"""Files of Replicate's API: photos that are sent ahead of the predictions that name them.

POST   /v1/files         a form with the file as `content`
GET    /v1/files         the caller's own, the newest first
GET    /v1/files/{id}    what is known about one
DELETE /v1/files/{id}    erases it
"""

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response

from deployments import problems
from deployments.addresses import base_url
from deployments.admission import Admission
from deployments.body import parsed
from deployments.jobs_api import STORE
from deployments.making import in_time
from deployments.multipart import Part, is_multipart, read_form
from deployments.replicate_body import FACE, wrong
from deployments.replicate_view import FILES, file, page
from deployments.service import Service, caller, prompt_answer
from deployments.threads import to_its_end
from pipeline.errors import (
    BodyTooLarge,
    ImageNotFound,
    MalformedBody,
    PhotoFetchFailed,
    StoreUnavailable,
    UnsupportedContentType,
)
from pipeline.request import MAX_PEOPLE, MAX_PHOTOS
from pipeline.settings import LimitSettings
from pipeline.uploads import UploadStore

FIELD_BYTES = 65_536  # of a form, besides the file
MAX_NAME = 255
MAX_METADATA = 4096  # characters of JSON
ADDRESS = re.compile(rf"https?://([^/]+(?:/.*)?){FILES}/([0-9a-f]{{32}})")


async def with_files(
    given: Mapping[str, Any], base: str, most: int, read: Callable[[str], Awaitable[bytes]]
) -> dict[str, Any]:
    """An input whose photos are in place of the addresses of files of this very service; nothing is fetched by HTTP.

    `read` gives the bytes of a file by its id, `most` bounds the bytes of all together. Raises PhotoFetchFailed,
    BodyTooLarge.
    """
    ids = {address: found for address in _addresses(given) if (found := _file_id(address, base)) is not None}
    photos, size = dict[str, str](), 0
    for address, file_id in ids.items():
        try:
            data = await read(file_id)
        except ImageNotFound:
            raise PhotoFetchFailed("The input names a file that is not there any more; send it again.") from None
        size += len(data)
        if size > most:
            raise BodyTooLarge(f"The files of the input have more than {most} bytes together; send smaller ones.")
        photos[address] = base64.b64encode(data).decode()
    return _replaced(given, photos) if photos else dict(given)


def _people(given: Mapping[str, Any]) -> list[Any]:
    people = given.get("people")
    return people if isinstance(people, list) else []


def _photos(person: Any) -> list[Any]:
    photos = person.get("photos") if isinstance(person, dict) else None
    return photos if isinstance(photos, list) else []


def _addresses(given: Mapping[str, Any]) -> Iterator[str]:
    """What may be the address of a photo in an input that nobody has checked yet, and no more than there may be."""
    people = _people(given)[:MAX_PEOPLE]
    every = [given.get(FACE), *(photo for person in people for photo in _photos(person)[:MAX_PHOTOS])]
    for photo in every:
        address = photo.get("url") if isinstance(photo, dict) else photo
        if isinstance(address, str) and len(address) < 2048:
            yield address


def _replaced(given: Mapping[str, Any], photos: Mapping[str, str]) -> dict[str, Any]:
    def photo(value: Any) -> Any:
        address = value.get("url") if isinstance(value, dict) else value
        return photos.get(address, value) if isinstance(address, str) else value

    whole = {**given, FACE: photo(given.get(FACE))}
    if _people(given):
        whole["people"] = [
            {**person, "photos": [photo(value) for value in _photos(person)]} if _photos(person) else person
            for person in _people(given)
        ]
    return whole


def _file_id(address: str, base: str) -> str | None:
    """The id of a file of this service, by the name that the caller has for it; None for another address."""
    found = ADDRESS.fullmatch(address)
    return found[2] if found and found[1].lower() == base.partition("://")[2].lower() else None


async def _upload(parts: list[Part], uploads: UploadStore, tenant: str) -> dict[str, Any]:
    values = dict(parts)
    if len(values) < len(parts):
        raise MalformedBody("The body names one field twice; say it once.")
    content, name, metadata = values.get("content"), values.get("filename"), values.get("metadata") or "{}"
    if not isinstance(content, bytes):
        raise wrong("content", "send the file as this field of the form")
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
        raise wrong("filename", f"it is text of 1 to {MAX_NAME} characters")
    if not isinstance(metadata, str) or len(metadata) > MAX_METADATA:
        raise wrong("metadata", f"it is a JSON object of at most {MAX_METADATA} characters")
    labels = parsed(metadata.encode())
    return await to_its_end(uploads.save, content, tenant, name, labels)


def router(service: Service, admission: Admission, limits: LimitSettings) -> fastapi.APIRouter:
    """The routes below /v1/files."""
    routes = fastapi.APIRouter()
    missing = problems.documented(ImageNotFound, StoreUnavailable)

    @routes.post(FILES, status_code=201, responses=problems.documented(*problems.leaves()), openapi_extra=_body())
    async def create(http: fastapi.Request) -> Response:
        """Replicate's `files.create`: keep a photo for a day, for predictions that name its address."""
        async with in_time(limits):
            with admission.admitted(caller(http)):
                most = service.uploads.max_bytes + FIELD_BYTES
                if not is_multipart(http.headers):
                    raise UnsupportedContentType("Send the file as the field content of a multipart/form-data body.")
                parts = await read_form(http.headers, http.stream(), most)
                record = await _upload(parts, service.uploads, caller(http).tenant)
        return JSONResponse(file(record, base_url(http)), 201)

    @routes.get(FILES, responses=problems.documented(StoreUnavailable))
    async def every(http: fastapi.Request) -> Response:
        """The caller's files, the newest first."""
        records = await prompt_answer(asyncio.to_thread(service.uploads.records, caller(http).tenant), STORE)
        return JSONResponse(page([file(record, base_url(http)) for record in records]))

    @routes.get(f"{FILES}/{{file_id}}", responses=missing)
    async def one(file_id: str, http: fastapi.Request) -> Response:
        """What is known about a file."""
        record = await prompt_answer(asyncio.to_thread(service.uploads.record, file_id, caller(http).tenant), STORE)
        return JSONResponse(file(record, base_url(http)))

    @routes.delete(f"{FILES}/{{file_id}}", status_code=204, responses=missing)
    async def erase(file_id: str, http: fastapi.Request) -> Response:
        """Erase a file."""
        await prompt_answer(asyncio.to_thread(service.uploads.delete, file_id, caller(http).tenant), STORE)
        return Response(status_code=204)

    return routes


def _body() -> dict[str, Any]:
    text = {"type": "string"}
    fields = {"content": {"type": "string", "format": "binary"}, "filename": text, "metadata": text}
    form = {"type": "object", "required": ["content"], "properties": fields}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}

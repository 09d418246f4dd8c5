"""The body of a POST: counted while it streams in, parsed strictly, validated; never repeated to anybody."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from pipeline.errors import BodyTooLarge, InvalidRequest, MalformedBody, UnsupportedContentType
from pipeline.request import Record, Request

R = TypeVar("R", bound=Record)
# The largest honest request needs a few hundred; base64 has none of these characters. More would only fill the memory:
# a value of two bytes in JSON takes sixty in Python.
MAX_SEPARATORS = 50_000
MAX_FIELD_ERRORS = 20
INLINE_BYTES = 1_000_000  # parsed in about 3 ms; less than it can take to hand it to another thread and back


async def read_request(headers: Mapping[str, str], chunks: AsyncIterator[bytes], max_bytes: int) -> Request:
    """A body as a Request; raises as `read`."""
    return await read(Request, headers, chunks, max_bytes)


async def read(kind: type[R], headers: Mapping[str, str], chunks: AsyncIterator[bytes], max_bytes: int) -> R:
    """A JSON body as a record; raises UnsupportedContentType, BodyTooLarge, MalformedBody, InvalidRequest."""
    check_headers(headers, max_bytes)
    data = bytearray()
    async for chunk in counted(chunks, max_bytes):
        data += chunk
    if len(data) < INLINE_BYTES:
        return record(kind, parsed(data))
    return await asyncio.to_thread(lambda: record(kind, parsed(data)))  # it takes a while, and others are waiting


async def counted(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncGenerator[bytes]:
    """The chunks of a body; raises BodyTooLarge at the first that is too much, whatever Content-Length promised."""
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


def check_headers(headers: Mapping[str, str], max_bytes: int) -> None:
    """What of JSON can be refused before a byte of it is read; header names are lower case."""
    kind, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower()
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
        raise UnsupportedContentType("Send JSON in UTF-8, with the header Content-Type: application/json.")
    check_size(headers, max_bytes)


def check_size(headers: Mapping[str, str], max_bytes: int) -> None:
    """What of any body can be refused before a byte of it is read; header names are lower case."""
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedContentType("Send the body as it is, without Content-Encoding; photos are compressed already.")
    length = headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {max_bytes} bytes; send fewer or smaller photos, or their addresses.")


def parse(data: bytes | bytearray) -> Request:
    """JSON bytes as a Request; raises MalformedBody, InvalidRequest."""
    return validated(parsed(data))


def parsed(data: bytes | bytearray) -> dict[str, Any]:
    """JSON bytes as one object, each key once; raises MalformedBody."""
    if sum(data.count(separator) for separator in (b",", b"[", b"{")) > MAX_SEPARATORS:
        raise MalformedBody("The body holds far more values than a request has; see GET /openapi.json.")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise MalformedBody("The body is nested too deeply; see GET /openapi.json.") from error
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body is not UTF-8 (at byte {error.start}); send it in UTF-8.") from error
    except json.JSONDecodeError as error:
        raise MalformedBody(f"The body is not JSON ({error.msg}, at character {error.pos}); mend it there.") from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise MalformedBody("The body holds a number that is far too long; shorten it.") from error
    if not isinstance(value, dict):
        raise MalformedBody('The body has to be one JSON object, such as {"prompt": "portrait"}.')
    return value


def validated(value: Mapping[str, Any]) -> Request:
    """JSON values as a Request; raises InvalidRequest as `record`."""
    return record(Request, value)


def record(kind: type[R], value: Mapping[str, Any]) -> R:
    """JSON values as a record; raises InvalidRequest, which names fields but repeats no values."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(error) from None  # pydantic's error holds what was sent


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise MalformedBody("The body names one field twice; say it once.")
    return value


def _constant(_: str) -> NoReturn:
    raise MalformedBody("The body holds NaN or Infinity, which JSON does not have; send a number.")


def _invalid(error: ValidationError) -> InvalidRequest:
    found: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False)[:1000]:
        problems = found.setdefault(_field(detail["loc"]), [])
        problem = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            problem = "there is no such field; remove it or correct its name"
        if problem not in problems:
            problems.append(problem)
    fields = tuple((field, " or ".join(problems)) for field, problems in found.items())[:MAX_FIELD_ERRORS]
    told = InvalidRequest(f"The request does not fit: {fields[0][0]}: {fields[0][1]}.")
    told.fields = fields
    return told


def _field(location: tuple[int | str, ...]) -> str:
    """Where in the body, as people[0].face; without pydantic's notes on unions and without names that are no names."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,31}", part) and not part.startswith("function"):
            path += f".{part}" if path else part
        else:
            break
    return path or "(body)"

"""Rows of a batch: where a request stands in the input file, its id, and what is known of it on its way.

Only JSONL is ever read: a file that says how to build objects (pickle, parquet with extension types) can run code.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from pipeline.errors import PipelineError
from pipeline.faces import Faces
from pipeline.identity import Identity
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.text import Text

CHUNK = 1 << 20  # bytes read at a time, so that one endless line cannot fill the memory


@dataclass(frozen=True, slots=True)
class Line:
    """A row's place in the input: its number from 0, its first byte, its bytes, and the id its image gets."""

    row: int
    offset: int
    length: int
    id: str


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One row on its way through the steps; `result` is its line of the output once nothing more is to be done."""

    line: Line
    request: Request | None = None
    faces: tuple[Faces, ...] = ()
    identities: tuple[Identity, ...] = ()
    text: Text | None = None
    negative: Text | None = None
    pictures: tuple[Picture, ...] = ()
    result: Mapping[str, Any] | None = None


def locate(address: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path in it, of a local path or an address such as s3://bucket/requests.jsonl."""
    if "://" in address:
        filesystem, path = fs.FileSystem.from_uri(address)
        return filesystem, path
    return fs.LocalFileSystem(), os.path.abspath(address)


def index(address: str, preset: str) -> list[Line]:
    """Every line of a JSONL file that is not blank, in order.

    An id is 32 hexadecimal digits made of the preset, the line's bytes and how often the same line came before: a
    second run of the same file finds what the first one stored, and equal lines still give different pictures.
    """
    seen: Counter[str] = Counter()
    lines = []
    for row, (offset, length, digest) in enumerate(_lines(address, preset.encode() + b"\n")):
        repeated = f"{digest}/{seen[digest]}".encode()
        lines.append(Line(row, offset, length, hashlib.sha256(repeated).hexdigest()[:32]))
        seen[digest] += 1
    return lines


def _lines(address: str, salt: bytes) -> Iterator[tuple[int, int, str]]:
    filesystem, path = locate(address)
    digest, offset, length, blank = hashlib.sha256(salt), 0, 0, True
    with filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK):
            *ended, rest = chunk.split(b"\n")
            for piece in ended:
                digest.update(piece)
                length += len(piece)
                if not (blank and not piece.strip()):
                    yield offset, length, digest.hexdigest()
                digest, offset, length, blank = hashlib.sha256(salt), offset + length + 1, 0, True
            digest.update(rest)
            length += len(rest)
            blank = blank and not rest.strip()
    if not blank:
        yield offset, length, digest.hexdigest()


def read(address: str, line: Line) -> bytes:
    """The bytes of one line, without its end."""
    filesystem, path = locate(address)
    with filesystem.open_input_file(path) as file:
        file.seek(line.offset)
        return bytes(file.read(line.length))


def error_result(work: Work, error: PipelineError) -> dict[str, Any]:
    """The output line of a row that failed; it has the row's id where the request itself was fine."""
    named = {} if work.request is None else {"id": work.line.id}
    return {"row": work.line.row, **named, "error": {"code": error.code, "detail": str(error)}}

"""Server-sent events, read by the HTML standard (section 9.2, "Server-sent events")."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LINE_END = re.compile(rb"\r\n|\n|\r")
BOM = "\ufeff"


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream.

    id: the latest that the stream gave, to go on after; retry: milliseconds that it asked a client to wait, if it did.
    """

    id: str
    name: str
    data: str
    retry: int | None = None


def lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The complete lines of a stream, without their ends: CR, LF or both, and nothing else ends one."""
    rest = b""
    for chunk in chunks:
        *complete, rest = _split(rest + chunk)
        for line in complete:
            yield line.decode(errors="replace")


def events(chunks: Iterable[bytes], last_id: str = "") -> Iterator[Event]:
    """The events of a stream; one that it breaks off in is none. `last_id`: what was had before it."""
    name, data, retry = "", list[str](), None
    for number, line in enumerate(lines(chunks)):
        if not line:
            if data:
                yield Event(last_id, name or "message", "\n".join(data), retry)
            name, data = "", []
            continue
        field, _, value = (line.removeprefix(BOM) if number == 0 else line).partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id" and "\0" not in value:
            last_id = value
        elif field == "retry" and value.isascii() and value.isdecimal():
            retry = int(value)


def _split(data: bytes) -> list[bytes]:
    """Lines, of which the last is not complete; a CR at the very end may be half of an end."""
    half = data.endswith(b"\r")
    parts = LINE_END.split(data[:-1] if half else data)
    return [*parts[:-1], parts[-1] + b"\r"] if half else parts

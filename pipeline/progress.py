"""ServerEvent: what callers see of a job while it is made, numbered so that they can go on after a lost connection.

An id is {attempt}-{n}: n counts within an attempt, and a job that is taken over goes on with the next attempt's.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.events import Event, Previewed, Stepped
from pipeline.jobs import ENDS
from pipeline.picture import encode

PREVIEW_QUALITY = 70


class Position(NamedTuple):
    """Where in a job's events something stands; they are ordered."""

    attempt: int
    number: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.number}"

    @classmethod
    def parse(cls, text: str) -> "Position":
        """A Last-Event-ID; what is none means the beginning."""
        found = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", text)
        return BEGINNING if found is None else cls(int(found[1]), int(found[2]))


BEGINNING = Position(-1, -1)
LAST = 999_999_999  # the number of an end that is told by the store, as the events before it are forgotten


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a job; `data` are JSON values."""

    at: Position
    name: str
    data: Mapping[str, Any]

    @property
    def ends(self) -> bool:
        """Whether none follows."""
        return self.name in ENDS


def told(number: int, event: Event) -> tuple[str, dict[str, Any]] | None:
    """What happens to picture `number` in an engine, as name and data of an event; None for what is not told."""
    match event:
        case Stepped(done, total):
            return "step", {"number": number, "step": done, "steps": total}
        case Previewed(pixels):
            data = base64.b64encode(encode(pixels, "jpg", PREVIEW_QUALITY)).decode()
            return "preview", {"number": number, "media_type": "image/jpeg", "data": data}
    return None

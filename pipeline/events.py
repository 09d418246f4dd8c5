"""Events: what happens to a picture in an engine, in the order in which it happens. They go from replica to replica."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import WorkerUnavailable


@dataclass(frozen=True, slots=True)
class Queued:
    """Accepted; so many pictures were here before."""

    ahead: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """Step `done` of `total` is over."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, eq=False)
class Previewed:
    """What the picture will be, roughly: (h, w, 3) uint8, a pixel for each latent."""

    pixels: Any


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """The end: the finished picture."""

    picture: Any


@dataclass(frozen=True, slots=True, eq=False)
class Failed:
    """The end: why there is no picture."""

    error: Exception


Event = Queued | Stepped | Previewed | Done | Failed


async def last(events: AsyncIterator[Event], progress: Callable[[Event], None] = lambda _: None) -> Any:
    """The picture with which a stream of events ends; raises WorkerUnavailable where it ends without."""
    async for event in events:
        if isinstance(event, Done):
            return event.picture
        progress(event)
    raise WorkerUnavailable("A worker was lost in the middle of a picture; send the request again.")

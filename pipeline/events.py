"""Events: what happens to a picture in an engine, in the order in which it happens. They go from replica to replica."""

from dataclasses import dataclass
from typing import Any


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

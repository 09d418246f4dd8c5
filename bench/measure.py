"""How things are timed, and what a figure is: interleaved runs, medians, and the noise beside every ratio."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

PACKAGES = ("torch", "diffusers", "ray")
NO_GPU = "no GPU"


@dataclass(frozen=True, slots=True)
class Target:
    """What a value should be: at least (>=), at most (<=) or exactly (==) the limit."""

    sign: Literal[">=", "<=", "=="]
    limit: float

    def met(self, value: float) -> bool:
        """Whether the value is on the right side; NaN never is."""
        return {">=": value >= self.limit, "<=": value <= self.limit, "==": value == self.limit}[self.sign]

    def __str__(self) -> str:
        """As it stands in tables."""
        return f"{self.sign} {self.limit:g}"


def at_least(limit: float) -> Target:
    """The value should not be below the limit."""
    return Target(">=", limit)


def at_most(limit: float) -> Target:
    """The value should not be above the limit."""
    return Target("<=", limit)


def exactly(limit: float) -> Target:
    """The value should be the limit."""
    return Target("==", limit)


@dataclass(frozen=True, slots=True)
class Part:
    """One figure with its target; `unit` is empty for ratios and counts."""

    name: str
    value: float
    target: Target
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.target.met(self.value)


@dataclass(frozen=True, slots=True)
class Noise:
    """A'/A of one comparison: its median, and its first and last decile. Nothing between these can be told from 1."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Result:
    """What one benchmark found: its parts, the noise of its timing, and whatever else explains them.

    The first part's value stands for the benchmark; it is met when every part is. Without parts it was not measured,
    and `reason` says why. `method` is one sentence: what was compared, at which sizes.
    """

    parts: tuple[Part, ...] = ()
    noise: Noise | None = None
    method: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds of two ways, measured in turn: medians of each, and `ratio`, the median over the runs of b / a."""

    a: float
    b: float
    ratio: float
    noise: Noise


def interleaved(a: Callable[[], object], b: Callable[[], object], runs: int, warm: int = 2) -> Comparison:
    """Time a, b and a again in each run, after `warm` runs that do not count.

    The ratio of a run is b over the mean of the two a's around it, so that a drift of the machine's speed cancels.
    """
    triples = [(seconds(a), seconds(b), seconds(a)) for _ in range(runs + warm)][warm:]
    return compared(triples)


def compared(triples: Sequence[tuple[float, float, float]]) -> Comparison:
    """The comparison that the seconds of (a, b, a) of each run make; at least two runs."""
    noise = [after / before for before, _, after in triples]
    deciles = statistics.quantiles(noise, n=10, method="inclusive")
    return Comparison(
        a=statistics.median(value for before, _, after in triples for value in (before, after)),
        b=statistics.median(middle for _, middle, _ in triples),
        ratio=statistics.median(2 * middle / (before + after) for before, middle, after in triples),
        noise=Noise(statistics.median(noise), deciles[0], deciles[-1]),
    )


def widest(noises: Iterable[Noise]) -> Noise:
    """The worst of several: the one with the widest spread."""
    return max(noises, key=lambda noise: noise.high - noise.low)


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes; on a GPU until all that it started is done."""
    _synchronise()
    started = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - started


def _synchronise() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, Any]:
    """The hardware and the versions that the figures depend on; constant on one machine."""
    import torch

    facts = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none used",
        "python": platform.python_version(),
    }
    return facts | {name: _version(name) for name in PACKAGES}


def run_facts(command: str) -> dict[str, Any]:
    """When and how, and the load average: what else the machine was doing."""
    load = round(os.getloadavg()[0], 2)
    return {"date": datetime.now(UTC).date().isoformat(), "command": command, "load": load}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except FileNotFoundError:  # not Linux
        names = []
    return f"{names[0]} ({platform.machine()})" if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a GPU machine without Ray
        return "not installed"

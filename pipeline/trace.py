"""Trace: what was done to make a record, so that an answer can say how long each stage took and with which files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Seconds per stage (request, faces, identity, text, queue, denoise, store) and sha256 per model file."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    def __add__(self, other: "Trace") -> "Trace":
        """Both together; seconds of the same stage are added up."""
        seconds = dict(self.seconds)
        for stage, value in other.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        return Trace(seconds, {**self.models, **other.models})


def total(traces: Iterable[Trace]) -> Trace:
    """All of them together."""
    result = Trace()
    for trace in traces:
        result = result + trace
    return result

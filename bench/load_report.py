"""What the samples of a load say: percentiles, goodput, failures. Arithmetic only."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PERCENTILES = (50, 95, 99)
SHED = 429


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it was due, and what became of it, in seconds.

    latency: from the moment it was due to the end of its answer; lag: how late the client sent it. status 0 is no
    answer, and `code` then the client's error; else the code of a problem. service: what the stages worked for it;
    engine_wait: what it waited in the engine, where the answer tells it.
    """

    due: float
    latency: float
    lag: float
    status: int
    code: str = ""
    service: float | None = None
    engine_wait: float | None = None
    retry_after: bool = False

    @property
    def completed(self) -> bool:
        """Whether it was answered with a picture."""
        return self.status == 200


def service_seconds(timings: Mapping[str, float]) -> float | None:
    """The seconds that the stages of one answer worked, along the longest way; None without timings.

    The text is encoded beside the faces and the identity, so only the longer of the two ways counts.
    """
    if "denoise" not in timings:
        return None
    identity = timings.get("faces", 0.0) + timings.get("identity", 0.0)
    return max(identity, timings.get("text", 0.0)) + timings["denoise"] + timings.get("store", 0.0)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` per cent of the values do not exceed (nearest rank)."""
    if not values:
        raise ValueError("there is no percentile of nothing")
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """P50, P95 and P99; None where there are no values."""
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTILES} if values else None


def report(samples: Sequence[Sample], rate: float, seconds: float, slo: float) -> dict[str, Any]:
    """The whole report, as JSON values.

    offered_rate: what arrived a second; achieved_rate and goodput: pictures a second, all and those within the SLO,
    over the time from the start to the last answer, or to the end of the arrivals if that is later. attainment: the
    share of all arrivals that were good. queue_wait is latency without service; percentiles are None without values.
    """
    done = [sample for sample in samples if sample.completed]
    good = [sample for sample in done if sample.latency <= slo]
    shed = [sample for sample in samples if sample.status == SHED]
    told = [(sample.latency, sample.service) for sample in done if sample.service is not None]
    span = max([seconds, *(sample.due + sample.latency for sample in done)])
    failures = Counter(f"{sample.status} {sample.code}" for sample in samples if not sample.completed)
    return {
        "rate": rate,
        "seconds": seconds,
        "slo": slo,
        "arrivals": len(samples),
        "completed": len(done),
        "good": len(good),
        "offered_rate": len(samples) / seconds,
        "achieved_rate": len(done) / span,
        "goodput": len(good) / span,
        "attainment": len(good) / len(samples) if samples else None,
        "latency": percentiles([sample.latency for sample in done]),
        "queue_wait": percentiles([max(0.0, latency - service) for latency, service in told]),
        "service": percentiles([service for _, service in told]),
        "engine_wait": percentiles([sample.engine_wait for sample in done if sample.engine_wait is not None]),
        "shed": len(shed),
        "shed_latency": percentiles([sample.latency for sample in shed]),
        "shed_with_retry_after": sum(sample.retry_after for sample in shed),
        "failures": dict(sorted(failures.items())),
        "client_lag": percentiles([sample.lag for sample in samples]),
    }


def table(found: Mapping[str, Any]) -> str:
    """The report for people, as Markdown."""
    lines = [
        f"{found['arrivals']} requests in {found['seconds']:g} s ({found['offered_rate']:.2f}/s, asked for "
        f"{found['rate']:g}/s): {found['completed']} pictures, {found['good']} within {found['slo']:g} s.",
        f"Goodput {found['goodput']:.2f}/s of {found['achieved_rate']:.2f}/s achieved. Shed {found['shed']}, of these "
        f"with Retry-After {found['shed_with_retry_after']}.",
        *("", "| seconds | P50 | P95 | P99 |", "|---|---|---|---|"),
    ]
    for key in ("latency", "queue_wait", "service", "engine_wait", "shed_latency", "client_lag"):
        if found[key] is not None:
            lines.append(f"| {key.replace('_', ' ')} | {' | '.join(f'{v:.3f}' for v in found[key].values())} |")
    if found["failures"]:
        lines += ["", "| status and code | requests |", "|---|---|"]
        lines += [f"| {code} | {count} |" for code, count in found["failures"].items()]
    return "\n".join(lines)

"""The plots of docs/benchmarks.md, drawn from the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#222222", "#6b6b6b", "#dddddd"
STEP, REQUEST, WAIT = "#1f6f8b", "#c8553d", "#d9a441"
LOAD, LEVELS = "bench_load.png", "bench_levels.png"


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw what the results have figures for; file names in `folder`, with captions."""
    drawn = {}
    if sweep := _sweep(results, "B12"):
        _load(sweep, results["B12"]["details"], folder / LOAD)
        drawn[LOAD] = "B12: latency and goodput against load. Open-loop Poisson arrivals over HTTP, one replica."
    if sweep := _sweep(results, "B8"):
        _levels(sweep, folder / LEVELS)
        drawn[LEVELS] = (
            "B8: 4-step and 28-step pictures, mixed one to one, against load: scheduled by steps and by whole requests."
        )
    return drawn


def _sweep(results: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = results.get(key, {}).get("details", {}).get("sweep", ())
    return found


def _load(sweep: Sequence[Mapping[str, Any]], details: Mapping[str, Any], path: Path) -> None:
    """Latency with its waiting on the left, goodput on the right; both against load in units of the capacity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    loads = [point["load"] for point in sweep]
    for name, colour, line in (("latency", STEP, "-"), ("queue_wait", WAIT, "--")):
        for percent, alpha in (("p50", 1.0), ("p95", 0.55)):
            values = [point[name][percent] for point in sweep]
            label = f"{name.replace('_', ' ')}, {percent.upper()}"
            left.plot(loads, values, line, marker="o", ms=4, color=colour, alpha=alpha, label=label)
    left.axhline(details["slo"], color=REQUEST, lw=1, label="SLO")
    _style(left, "offered load / capacity", "seconds, of answered requests")
    right.plot(loads, [point["goodput"] for point in sweep], "-o", ms=4, color=STEP, label="within the SLO")
    right.plot(loads, [point["offered_rate"] for point in sweep], ":", color=MUTED, label="offered")
    right.axhline(details["capacity"], color=REQUEST, lw=1, label="capacity")
    _style(right, "offered load / capacity", "requests a second")
    figure.savefig(path, dpi=110)


def _levels(sweep: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What short jobs wait for their first step, and what all jobs take, step-level against request-level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    loads = [point["load"] for point in sweep]
    shown = (("short", "latency of 4-step pictures"), ("long", "latency of 28-step pictures"))
    for axis, (what, label) in zip(axes, shown, strict=True):
        for level, colour in (("step_level", STEP), ("request_level", REQUEST)):
            for percent, line in (("p50", "-"), ("p95", "--")):
                values = [point[level][what][percent] for point in sweep]
                name = f"{level.replace('_', '-')}, {percent.upper()}"
                axis.plot(loads, values, line, marker="o", ms=4, color=colour, label=name)
        _style(axis, "offered load / capacity", "in latencies of a 28-step one alone")
        axis.set_title(label, color=INK, fontsize=10)
    figure.savefig(path, dpi=110)


def _style(axis: "Axes", x: str, y: str) -> None:
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    axis.set_ylim(bottom=0)
    axis.grid(color=GRID, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=MUTED)
    axis.legend(frameon=False, fontsize=8)

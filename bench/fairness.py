"""B8 and B15: short pictures behind long ones, and pictures that are cancelled."""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.engines import GAINS, TRUE_SMALL, Bench, Heard, arriving, drain, networks, together, work
from bench.load import arrivals
from bench.load_report import percentiles
from bench.measure import Part, Result, at_most, compared, exactly
from bench.registry import Run
from pipeline.curves import Curves
from pipeline.drawing import Drawing, Work
from pipeline.engine import Engine

SHORT, LONG, ARRIVAL = 4, 28, 2  # steps, and after how many of the long one's the short one arrives
LOADS = (0.4, 0.6, 0.8, 0.9)  # shares of what the engine can do one row at a time
SWEEP_JOBS, SWEEPS = 60, 3  # pictures that arrive at each load, and how many times
CYCLES = 1000
WARM = 2
FULL_RUNS = 15


def short_behind_long(run: Run) -> Result:
    """A short picture that arrives while a long one is drawn: by steps, and by whole requests. Without batching."""
    bench = TRUE_SMALL if run.device == "cuda" else GAINS
    shared = networks(bench, run.device)
    engine = shared.engine(Curves(), max_rows=1)  # what is won is the order's, not the batch's
    short, long = work(bench, 1, num_steps=SHORT), work(bench, 2, num_steps=LONG)
    runs = [_meetings(engine, short, long) for _ in range(run.runs + WARM)][WARM:]
    found = compared([(one.by_step[0].latency, one.whole[0].latency, one.again[0].latency) for one in runs])
    first = [one.by_step[0].waited / one.whole[0].waited for one in runs]
    return Result(
        parts=(
            Part("the short one's latency", 1 / found.ratio, at_most(0.3)),
            Part("the long one's latency / alone", statistics.median(one.slowed for one in runs), at_most(1.25)),
        ),
        noise=found.noise,
        method=f"{bench.name}: a picture of {SHORT} steps arrives after step {ARRIVAL} of one of {LONG}; the seconds "
        "from its arrival to its end, with steps as the unit over whole requests, one row at a time.",
        details={
            "to the end of the first step": statistics.median(first),
            "sweep": _sweep(bench, engine, run),
        },
    )


@dataclass(frozen=True, slots=True)
class Meetings:
    """What the short and the long one heard: by steps, by whole requests, by steps again; and the long one alone."""

    by_step: tuple[Heard, Heard]
    whole: tuple[Heard, Heard]
    again: tuple[Heard, Heard]
    alone: tuple[Heard, Heard]

    @property
    def slowed(self) -> float:
        """The long one's latency by steps, before and after, over what it takes alone, before and after."""
        together = self.by_step[1].latency + self.again[1].latency
        return together / (self.alone[0].latency + self.alone[1].latency)


def _meetings(engine: Engine, short: Work, long: Work) -> Meetings:
    def meet(whole_requests: bool) -> tuple[Heard, Heard]:
        first = Heard()
        engine.submit(long, first)
        for _ in range(ARRIVAL):
            engine.step()
        second = Heard()  # it arrives now
        if whole_requests:
            drain(engine)
        engine.submit(short, second)
        drain(engine)
        return second, first

    before, by_step = together(engine, [long])[0], meet(False)
    whole, again = meet(True), meet(False)
    return Meetings(by_step, whole, again, (before, together(engine, [long])[0]))


def _sweep(bench: Bench, engine: Engine, run: Run) -> list[Mapping[str, Any]]:
    """Latencies of a mix, half short and half long, against load; in seconds of a long picture drawn alone."""
    jobs = [work(bench, seed, num_steps=SHORT if seed % 2 else LONG) for seed in range(20)]
    count = SWEEP_JOBS if run.runs >= FULL_RUNS else 2 * run.runs  # a quick look draws a quick curve
    points: list[Mapping[str, Any]] = []
    for load in LOADS:
        taken: dict[str, list[tuple[float, int]]] = {"step_level": [], "request_level": []}
        for seed in range(SWEEPS):
            _add_latencies(taken, engine, [jobs[(7 * number) % len(jobs)] for number in range(count)], (load, seed))
        levels = {level: _by_length(latencies) for level, latencies in taken.items()}
        points.append({"load": load, **levels})
    return points


def _add_latencies(
    taken: Mapping[str, list[tuple[float, int]]], engine: Engine, works: Sequence[Work], drawn: tuple[float, int]
) -> None:
    """Let pictures arrive at a load, by moments that a seed draws, under both levels; add (latency, steps) of each."""
    load, seed = drawn
    long = next(job for job in works if job.request.num_steps == LONG)
    # the machine's speed now: it drifts more from load to load than the two levels differ
    unit = statistics.median(together(engine, [long])[0].latency for _ in range(5))
    rate = load / (unit * statistics.mean(job.request.num_steps / LONG for job in works))
    moments = arrivals(rate, 2 * len(works) / rate + 10 * unit, seed)[: len(works)]
    for level, latencies in taken.items():
        heard = arriving(engine, works, moments, whole_requests=level == "request_level")
        latencies += [(one.latency / unit, job.request.num_steps) for one, job in zip(heard, works, strict=True)]


def _by_length(latencies: Sequence[tuple[float, int]]) -> dict[str, Any]:
    return {
        name: percentiles([latency for latency, steps in latencies if steps == length])
        for name, length in (("short", SHORT), ("long", LONG))
    }


def cancelling(run: Run) -> Result:
    """Pictures cancelled at every place of their way: how many steps until the row is free, and what is left."""
    bench = TRUE_SMALL if run.device == "cuda" else GAINS
    engine = networks(bench, run.device).engine(Curves())
    job = work(bench, 3, num_steps=LONG)
    cycles = CYCLES if run.device == "cpu" else 100  # FLUX's own steps take their time
    steps, seconds = 0, []
    for cycle in range(cycles):
        ticket = engine.submit(job, lambda _: None)
        for _ in range(cycle % 3):  # before the first step, after it, after the second
            engine.step()
        engine.cancel(ticket)
        started, taken = time.perf_counter(), 0
        while engine.stats().waiting + engine.stats().running + engine.stats().drawn:
            engine.step()
            taken += 1
        seconds.append(time.perf_counter() - started)
        steps = max(steps, taken)
    left = engine.stats()
    gc.collect()
    drawings = sum(type(thing) is Drawing for thing in gc.get_objects())
    return Result(
        parts=(
            Part("steps until the row is free, at most", steps, at_most(1)),
            Part(f"pictures left after {cycles} cycles", left.waiting + left.running + left.drawn, exactly(0)),
            Part("their tensors left", drawings, exactly(0)),
        ),
        method=f"{bench.name}: {cycles} pictures, cancelled before the first step, after it and after the second.",
        details={"cancelled": left.cancelled, "seconds until it is free": percentiles(seconds)},
    )

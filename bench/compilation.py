"""B13: whether a compiled FLUX stays compiled while requests vary."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from bench.engines import GAINS, TRUE_SMALL, Always, Bench, networks, together, work
from bench.measure import Part, Result, exactly
from bench.registry import Run
from pipeline.curves import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipeline.drawing import Work

REQUESTS = 20
MAX_ROWS = 3
TEXTS = (128, 256, 384, 512)  # tokens
MODES = ("regional", "whole")


def stability(run: Run) -> Result:
    """Graph breaks and recompiles of requests in another thread than the one that has compiled and warmed up."""
    bench = TRUE_SMALL if run.device == "cuda" else GAINS
    found = {mode: _varied(bench, mode, run.device) for mode in MODES}
    traced = "" if run.device == "cuda" else " Graphs are traced, but run by torch's own kernels: no code is made."
    return Result(
        parts=tuple(
            Part(f"{what}, {mode}", counts[what], exactly(0))
            for mode, counts in found.items()
            for what in ("graph breaks", "recompiles")
        ),
        method=f"{bench.name}: compiled and warmed up as at start-up in one thread; then {REQUESTS} pictures in "
        "another, each with an identity, weight, start step, guidance, number of steps, seed and prompt of its own. "
        f"Regional: one to {MAX_ROWS} in a pass, of nobody, one or two people, 128 to 512 text tokens. Whole: one at a "
        f"time, of one person, 128 tokens.{traced}",
        details={f"graphs, {mode}": counts["graphs"] for mode, counts in found.items()},
    )


def _varied(bench: Bench, mode: Any, device: str) -> "Mapping[str, int]":
    """Counts of torch.compile's first half, which decides on graphs; the second makes machine code of each."""
    import torch
    from torch._dynamo.utils import counters

    from pipeline.compiling import compile_flux
    from pipeline.rehearsal import dry_passes, warm_up

    torch._dynamo.reset()
    counters.clear()
    shared = networks(bench, device)
    compile_flux(shared.flux, mode, "inductor" if device == "cuda" else "eager")
    warm_up(shared.flux, shared.uncond, dry_passes(mode, [Shape(bench.grid, bench.grid, TEXTS[0])], MAX_ROWS))
    graphs = counters["stats"]["unique_graphs"]
    engine = shared.engine(Always(), max_rows=MAX_ROWS)
    with ThreadPoolExecutor(1) as thread:  # as in a replica, whose engine steps in a thread of its own
        for works in _regional(bench) if mode == "regional" else _whole(bench):
            thread.submit(together, engine, works).result()
    again = counters["stats"]["unique_graphs"] - graphs
    return {"graph breaks": sum(counters["graph_break"].values()), "recompiles": again, "graphs": graphs}


def _regional(bench: Bench) -> "Iterator[list[Work]]":
    """All requests in groups of one text length, which share passes."""
    numbers = iter(range(REQUESTS))
    for rows, text in zip(cycle(range(1, MAX_ROWS + 1)), cycle(TEXTS), strict=False):
        group = [_request(replace(bench, text=text), number, number % 3) for number in islice(numbers, rows)]
        if not group:
            return
        yield group


def _whole(bench: Bench) -> "Iterator[list[Work]]":
    return ([_request(replace(bench, text=TEXTS[0]), number, 1)] for number in range(REQUESTS))


def _request(bench: Bench, number: int, people: int) -> "Work":
    own = {"guidance_scale": 1.0 + 0.4 * number, "id_weight": 0.1 * (number + 1), "start_step": number % 2}
    return work(bench, number, people, num_steps=2 + number % 3, **own)

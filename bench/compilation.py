"""B13: whether a compiled FLUX stays compiled while requests vary."""

from typing import TYPE_CHECKING, Any

from bench.engines import GAINS, TRUE_SMALL, Bench, networks, together, work
from bench.measure import Part, Result, exactly
from bench.registry import Run
from pipeline.curves import Curves

if TYPE_CHECKING:
    from collections.abc import Mapping

REQUESTS = 20
MODES = ("regional", "whole")


def stability(run: Run) -> Result:
    """Graph breaks and recompiles over requests that vary in all but size and number of people, after the first."""
    bench = TRUE_SMALL if run.device == "cuda" else GAINS
    found = {mode: _varied(bench, mode, run.device) for mode in MODES}
    return Result(
        parts=tuple(
            Part(f"{what}, {mode}", counts[what], exactly(0))
            for mode, counts in found.items()
            for what in ("graph breaks", "recompiles")
        ),
        method=f"{bench.name}, torch.compile by acceleration.compile: {REQUESTS} pictures of one person after a first, "
        "each with an identity, weight, start step, guidance, number of steps, seed and prompt of its own, one at a "
        "time.",
        details={f"graphs, {mode}": counts["graphs"] for mode, counts in found.items()},
    )


def _varied(bench: Bench, mode: Any, device: str) -> "Mapping[str, int]":
    """Counts of torch.compile's first half, which decides on graphs; the second makes machine code of each."""
    import torch
    from torch._dynamo.utils import counters

    from pipeline.acceleration import compile_flux

    torch._dynamo.reset()
    counters.clear()
    shared = networks(bench, device)
    compile_flux(shared.flux, mode, "inductor" if device == "cuda" else "eager")
    engine = shared.engine(Curves(), max_rows=1)
    # with a step without the identity and one with it: `whole` has a graph for each number of people
    together(engine, [work(bench, 0, num_steps=2, start_step=1)])
    graphs = counters["stats"]["unique_graphs"]
    for number in range(1, REQUESTS + 1):
        together(
            engine,
            [work(bench, number, num_steps=2 + number % 3, start_step=number % 2, **_own(number))],
        )
    again = counters["stats"]["unique_graphs"] - graphs
    return {"graph breaks": sum(counters["graph_break"].values()), "recompiles": again, "graphs": graphs}


def _own(number: int) -> dict[str, float]:
    return {"guidance_scale": 1.0 + 0.4 * number, "id_weight": 0.1 * number}

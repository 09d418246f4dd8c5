"""B6 and B7: what pictures gain from sharing a pass, and whether the rule knows when they do."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.engines import MAX_ROWS, Always, Bench, Heard, Networks, benches, drain, networks, together, work
from bench.measure import Noise, Part, Result, at_least, at_most, compared, seconds, widest
from bench.models import id_tokens, inputs
from bench.registry import Run
from pipeline.curves import Curves
from pipeline.drawing import Work
from pipeline.engine import Engine

WARM = 2
PAIR_STEPS = 4
# Eight pictures that share nothing but their shape.
MIXED: Sequence[dict[str, Any]] = (
    {"num_steps": 5},
    {"num_steps": 6, "guidance_scale": 1.5},
    {"num_steps": 7, "id_weight": 0.3},
    {"num_steps": 5, "id_weight": 0.0},
    {"num_steps": 8, "start_step": 2},
    {"num_steps": 9, "end_step": 2},
    {"num_steps": 5, "true_cfg": 2.0},
    {"num_steps": 6, "people": 2, "guidance_scale": 7.0},
)


@dataclass(frozen=True, slots=True)
class Gain:
    """How many times more pictures a second eight at once give than one, in the engine and of the bare model."""

    engine: float
    bare: float
    ratio: float
    noise: Noise


def batch_gain(run: Run) -> Result:
    """The engine's gain at eight rows over the bare model's, and each row against the same picture drawn alone."""
    gains = {bench.name: _gain(bench, networks(bench, run.device), run) for bench in benches(run.device)}
    # In float32 on every device: in bfloat16 a product of eight rows rounds otherwise than that of one.
    differences = [_difference(bench, networks(bench, "cpu")) for bench in benches("cpu")]
    parts = [Part(name, gain.ratio, at_least(0.9)) for name, gain in gains.items()]
    return Result(
        parts=(*parts, Part("rows against serial, largest relative difference", max(differences), at_most(1e-5))),
        noise=widest(gain.noise for gain in gains.values()),
        method=f"pictures a second, {MAX_ROWS} rows at once over one at a time: the engine, over bare forward passes "
        "with the same identities. Rows: eight pictures that differ in steps, guidance, weight, start "
        "and end step, true CFG and people, and enter in turn, all in one pass, against each alone.",
        details={name: {"engine": gain.engine, "bare": gain.bare} for name, gain in gains.items()},
    )


def _gain(bench: Bench, shared: Networks, run: Run) -> Gain:
    jobs = [work(bench, seed, num_steps=bench.steps) for seed in range(MAX_ROWS)]
    engine = shared.engine(Always())
    one, all_rows = (_forward(bench, shared, rows, run.device) for rows in (1, MAX_ROWS))
    engine_gains, bare_gains, triples = [], [], []
    for _ in range(run.runs + WARM):
        before = seconds(lambda: together(engine, jobs))
        alone = statistics.mean(seconds(lambda job=job: together(engine, [job])) for job in jobs[:2])
        bare_gains.append(MAX_ROWS * seconds(one) / seconds(all_rows))
        after = seconds(lambda: together(engine, jobs))
        engine_gains.append(2 * MAX_ROWS * alone / (before + after))
        triples.append((before, alone, after))
    noise = compared(triples[WARM:]).noise
    engine_gains, bare_gains = engine_gains[WARM:], bare_gains[WARM:]
    ratio = statistics.median(ours / bare for ours, bare in zip(engine_gains, bare_gains, strict=True))
    return Gain(statistics.median(engine_gains), statistics.median(bare_gains), ratio, noise)


def _forward(bench: Bench, shared: Networks, rows: int, device: str) -> Callable[[], None]:
    """As many forward passes as a picture has steps, of so many rows with an identity each."""
    import torch

    from pipeline.models.flux import IdentityRow

    step = inputs(bench.size, device, rows, (bench.grid, bench.grid), bench.text)
    weight = torch.ones(1, 1, 1, device=device)
    with torch.inference_mode():
        prepared = [shared.flux.prepare(id_tokens(bench.size, device, row)) for row in range(rows)]
    people = [IdentityRow(row, identity, weight) for row, identity in enumerate(prepared)]

    @torch.inference_mode()
    def forward() -> None:
        for _ in range(bench.steps):
            shared.flux.predict(*step.all, people=people)

    return forward


def _difference(bench: Bench, shared: Networks) -> float:
    """The largest difference between pictures drawn in shared passes and alone, over the largest value."""
    jobs = [work(bench, seed, **fields) for seed, fields in enumerate(MIXED)]
    heard, batched, alone = [Heard() for _ in jobs], shared.engine(Always()), shared.engine(Curves(), max_rows=1)
    for job, listener in zip(jobs, heard, strict=True):
        batched.submit(job, listener)
        batched.step()  # the next enters when those before it are under way
    drain(batched)
    pairs = [(listener.result, together(alone, [job])[0].result) for job, listener in zip(jobs, heard, strict=True)]
    return max(float((shared - serial).abs().max() / serial.abs().max()) for shared, serial in pairs)


def batch_rule(run: Run) -> Result:
    """The mean latency of pairs of pictures under the rule, over that of the better of always and never."""
    parts, details, noises = [], {}, []
    for bench in benches(run.device):
        shared = networks(bench, run.device)
        pair = [work(bench, seed, num_steps=PAIR_STEPS) for seed in (1, 2)]
        by_rule, always, never = (
            shared.engine(shared.curves(pair[0])),
            shared.engine(Always()),
            shared.engine(shared.curves(pair[0]), max_rows=1),
        )
        order = (by_rule, always, never, by_rule)
        runs = [[_mean_latency(engine, pair) for engine in order] for _ in range(run.runs + WARM)][WARM:]
        every, none = (statistics.median(one[way] for one in runs) for way in (1, 2))
        best = 1 if every < none else 2
        ratio = statistics.median((one[0] + one[3]) / 2 / one[best] for one in runs)
        parts.append(Part(bench.name, ratio, at_most(1.05)))
        noises.append(compared([(one[0], one[1], one[3]) for one in runs]).noise)
        rule = statistics.median((one[0] + one[3]) / 2 for one in runs)
        details[bench.name] = {"rule": rule, "always": every, "never": none}
        del shared, by_rule, always, never, order
    return Result(
        parts=tuple(parts),
        noise=widest(noises),
        method=f"mean latency of two equal pictures of {PAIR_STEPS} steps that are submitted at once.",
        details=details,
    )


def _mean_latency(engine: Engine, pair: Sequence[Work]) -> float:
    return statistics.mean(one.latency for one in together(engine, pair))

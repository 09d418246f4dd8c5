"""B9: what a step costs besides FLUX's forward pass, in the engine and in diffusers' own FluxPipeline."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.engines import GAINS, TRUE_SMALL, Bench, Networks, networks, together, work
from bench.measure import Part, Result, at_most, compared
from bench.registry import Run
from pipeline.curves import Curves

if TYPE_CHECKING:
    from torch import nn

STEPS = 28
WARM = 2
MILLISECONDS = 1e3


def engine_overhead(run: Run) -> Result:
    """Seconds from the end of a forward pass to the start of the next, in the engine's loop and in FluxPipeline's."""
    bench = TRUE_SMALL if run.device == "cuda" else GAINS
    shared = networks(bench, run.device)
    ours, theirs = _engine(bench, shared), _pipeline(bench, shared, run.device)
    runs = [(ours(), theirs(), ours()) for _ in range(run.runs + WARM)][WARM:]
    engine = [steps for before, _, after in runs for steps in (before, after)]
    ratio = statistics.median((before.between + after.between) / 2 / middle.between for before, middle, after in runs)
    between = statistics.median(steps.between for steps in engine)
    return Result(
        parts=(
            Part("a step", between * MILLISECONDS, at_most(0.15), "ms"),
            Part(
                "share of a step",
                100 * statistics.median(s.between / (s.between + s.inside) for s in engine),
                at_most(5),
                "%",
            ),
            Part("over FluxPipeline's", ratio, at_most(1)),
        ),
        noise=compared([tuple(steps.between for steps in one) for one in runs]).noise,
        method=f"{bench.name}, one row of {STEPS} steps, no identity: from the end of one forward pass of the "
        "transformer to the start of the next, in FluxPipeline's own loop over the same transformer too, without its "
        "progress bar.",
        details={
            "forward_ms": MILLISECONDS * statistics.median(steps.inside for steps in engine),
            "pipeline_ms": MILLISECONDS * statistics.median(middle.between for _, middle, _ in runs),
        },
    )


@dataclass(frozen=True, slots=True)
class Steps:
    """Medians over a picture's steps: seconds inside the transformer's forward pass, and between two of them."""

    inside: float
    between: float


Loop = Callable[[], Steps]  # draws a picture


def _engine(bench: Bench, shared: Networks) -> Loop:
    engine, job = shared.engine(Curves(), max_rows=1), work(bench, 5, people=0, num_steps=STEPS)

    def loop() -> Steps:
        with _timed(shared.flux.transformer) as found:
            together(engine, [job])
        return found()

    return loop


def _pipeline(bench: Bench, shared: Networks, device: str) -> Loop:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    plain = shared.plain
    pipeline = FluxPipeline(scheduler=scheduler, vae=shared.vae, transformer=plain, **parts)
    pipeline.set_progress_bar_config(disable=True)
    job = work(bench, 5, people=0)
    embeds, pooled = (
        torch.from_numpy(array)[None].to(device, plain.dtype) for array in (job.text.tokens, job.text.pooled)
    )

    def loop() -> Steps:
        with _timed(plain) as found:
            pipeline(
                prompt_embeds=embeds,
                pooled_prompt_embeds=pooled,
                width=bench.edge,
                height=bench.edge,
                num_inference_steps=STEPS,
                guidance_scale=4.0,
                output_type="latent",
            )
        return found()

    return loop


@contextmanager
def _timed(module: "nn.Module") -> Iterator[Callable[[], Steps]]:
    """Note when each forward pass of a module begins and ends."""
    import torch

    begun, ended = list[float](), list[float]()

    def note(moments: list[float]) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    def found() -> Steps:
        inside = [end - begin for begin, end in zip(begun, ended, strict=True)]
        between = [begin - end for begin, end in zip(begun[1:], ended, strict=False)]
        return Steps(statistics.median(inside), statistics.median(between))

    hooks = [
        module.register_forward_pre_hook(lambda *_: note(begun)),
        module.register_forward_hook(lambda *_: note(ended)),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()

"""B1 and B2: what an identity costs in a step, at FLUX.1's true width, with random weights."""

import copy
from typing import TYPE_CHECKING

from bench.measure import Comparison, Part, Result, at_least, at_most, interleaved, widest
from bench.models import FLUX, SLICE, cross_attentions, id_tokens, identity_flux, inputs
from bench.registry import Run

if TYPE_CHECKING:
    import torch

    from pipeline.models.pulid import PulidCrossAttention

SPEEDUPS = {256: 4.0, 1024: 3.5}  # asked for, by image tokens


def folding(run: Run) -> Result:
    """The cross-attention as the official code runs it, over the same folded with its identity.

    Speed in the dtype of the device, the difference always in float32.
    """
    import torch

    from pipeline.models.folding import fold

    module = cross_attentions(SLICE, run.device)[0]
    tokens, exact = id_tokens(SLICE, run.device), copy.deepcopy(module).float()
    speedups, differences, found = [], [], {}
    with torch.inference_mode():
        for count, asked in SPEEDUPS.items():
            image = torch.randn(1, count, SLICE.dim, generator=torch.Generator().manual_seed(count)).to(run.device)
            plain, folded = exact(tokens.float(), image), fold(exact, tokens.float())(image)
            differences.append(float((folded - plain).abs().max() / plain.abs().max()))
            found[count] = _compared(module, tokens, image.to(tokens.dtype), run.runs)
            speedups.append(Part(f"{count} image tokens", found[count].ratio, at_least(asked)))
    return Result(
        parts=(*speedups, Part("largest relative difference, float32", max(differences), at_most(1e-5))),
        noise=widest(one.noise for one in found.values()),
        method=f"seconds, plain over folded; 3072 -> 16 x 128, 32 identity tokens, {tokens.dtype}.",
        details={f"{count} image tokens": {"plain": one.b, "folded": one.a} for count, one in found.items()},
    )


def _compared(module: "PulidCrossAttention", tokens: "torch.Tensor", image: "torch.Tensor", runs: int) -> Comparison:
    from pipeline.models.folding import fold

    folded = fold(module, tokens)
    return interleaved(lambda: folded(image), lambda: module(tokens, image), runs)


def identity_overhead(run: Run) -> Result:
    """A step with one identity, prepared, over the same step without."""
    import torch

    from pipeline.models.flux import IdentityRow

    gpu = run.device == "cuda"
    size, grid = (FLUX, (64, 64)) if gpu else (SLICE, (16, 16))
    with torch.inference_mode():
        flux, step = identity_flux(size, run.device), inputs(size, run.device, 1, grid, 128)
        someone = IdentityRow(0, flux.prepare(id_tokens(size, run.device)), torch.ones(1, 1, 1, device=run.device))
        found = interleaved(
            lambda: flux.predict(*step.all), lambda: flux.predict(*step.all, people=[someone]), run.runs, warm=1
        )
    return Result(
        parts=(Part("ratio", found.ratio, at_most(1.03)),),
        noise=found.noise,
        method=f"{size.num_layers} double and {size.num_single_layers} single blocks of true width, "
        f"{grid[0] * grid[1]} image and 128 text tokens, {step.latents.dtype}, modulation computed in the step.",
        details={"without": found.a, "with": found.b},
    )

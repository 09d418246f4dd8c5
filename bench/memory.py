"""B14: the weights that a step needs, with modulation from a table and without, at FLUX.1-dev's configuration."""

from typing import TYPE_CHECKING

from bench.measure import Part, Result, at_most, exactly
from bench.models import D64, FLUX, cross_attentions, id_tokens, identity_flux, inputs, nbytes, transformer
from bench.registry import Run

if TYPE_CHECKING:
    from pipeline.models.flux import IdentityFlux, IdentityRow

GB = 1e9
RESIDENT, STOCK = 17.31, 23.80  # GB in bfloat16, asked for


def resident_weights(run: Run) -> Result:
    """Counted on the meta device in bfloat16; on a GPU also allocated. The difference is that of a small model."""
    from pipeline.models.modulation import read_table

    stock = transformer(FLUX, "meta")
    resident, whole = nbytes(read_table(stock)) / GB, nbytes(stock) / GB
    adapters = sum(nbytes(module) for module in cross_attentions(FLUX, "meta")) / GB
    parts = [
        Part("with the table", round(resident, 2), at_most(RESIDENT), "GB"),
        Part("stock", round(whole, 2), exactly(STOCK), "GB"),
        Part("largest difference of a step's output", _difference(), exactly(0.0)),
    ]
    if run.device == "cuda":
        parts.append(Part("allocated on the GPU with the table", _allocated(), at_most(1.01 * RESIDENT), "GB"))
    return Result(
        parts=tuple(parts),
        method="weights of FLUX.1-dev in bfloat16 that a step reads; table in host memory, identities folded. "
        "The output: 2 + 4 blocks of width 64, float32, eight times and guidances.",
        details={"ratio": resident / whole, "cross-attentions, which a folded identity does not need": adapters},
    )


def _difference() -> float:
    """The largest difference between a step with its modulation computed and one that reads it from the table."""
    import torch

    live, table = identity_flux(D64, "cpu"), identity_flux(D64, "cpu", "table")
    step = inputs(D64, "cpu", 1, (8, 8), 32)
    worst = 0.0
    with torch.inference_mode():
        people = [_somebody(live), _somebody(table)]
        times = torch.linspace(1.0, 0.05, 8)
        for guidance in torch.linspace(1.0, 8.0, 8):
            rows = table.conditioning(times, guidance[None], step.pooled)
            for time, row in zip(times, rows, strict=True):
                ways = ((live, step.pooled, people[0]), (table, row[None], people[1]))
                one, other = (
                    flux.predict(step.latents, time[None], guidance[None], step.text, pooled, step.ids, [person])
                    for flux, pooled, person in ways
                )
                worst = max(worst, float((one - other).abs().max()))
    return worst


def _somebody(flux: "IdentityFlux") -> "IdentityRow":
    import torch

    from pipeline.models.flux import IdentityRow

    return IdentityRow(0, flux.prepare(id_tokens(D64, "cpu")), torch.ones(1, 1, 1))


def _allocated() -> float:
    """GB on the GPU once the modulation's weights have gone to the host."""
    import torch

    from pipeline.models.modulation import Modulation, read_table

    before = torch.cuda.memory_allocated()
    stock = transformer(FLUX, "cuda")
    kept = Modulation(stock, host=True), read_table(stock)
    allocated = (torch.cuda.memory_allocated() - before) / GB
    del kept
    return allocated

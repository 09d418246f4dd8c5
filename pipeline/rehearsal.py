"""Passes of FLUX on zeros: by the first picture, all that it needs is compiled and how long it takes is known."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.curves import Shape
from pipeline.models.flux import IdentityRow
from pipeline.models.sampling import image_ids

if TYPE_CHECKING:
    from pipeline.models.flux import IdentityFlux
    from pipeline.models.folding import PreparedIdentity

OTHER_TEXT = 256  # tokens: another length than that of the usual shapes
ROWS = (1, 2, 3)


class DryPass(NamedTuple):
    """One pass: `photos` is how many fused ones the last row's person has; 0: nobody is in it."""

    shape: Shape
    rows: int
    photos: int


def dry_passes(mode: Literal["off", "regional", "whole"], shapes: Sequence[Shape], max_rows: int) -> list[DryPass]:
    """The passes after which what can be asked of a FLUX is compiled; with `whole`, a picture of each shape.

    A regional graph fits what it is made for, and then anything in what has changed once; so size and text length
    change together, for the fewest graphs. `shapes`: what is usual.
    """
    if mode == "off":
        return []
    if mode == "whole":
        return [DryPass(shape, 1, photos) for shape in shapes for photos in (0, 1)]
    first = shapes[0]
    second = next((shape for shape in shapes if shape.tokens != first.tokens), first._replace(rows=first.rows + 1))
    pair = (first, second._replace(text=OTHER_TEXT))
    return [DryPass(shape, rows, photos) for rows, shape, photos in product(ROWS, pair, (0, 1, 2)) if rows <= max_rows]


@torch.inference_mode()
def warm_up(flux: "IdentityFlux", uncond: Tensor, passes: Iterable[DryPass]) -> None:
    """Run passes once; the people in them are nobody, whose identity tokens are `uncond` (1, T, kv_dim).

    One that the memory is too short for is left out.
    """
    nobody: dict[int, PreparedIdentity] = {}
    for shape, rows, photos in passes:
        people: list[IdentityRow] = []
        if photos:
            if photos not in nobody:
                nobody[photos] = flux.prepare(uncond.repeat(1, photos, 1))
            weight = torch.ones(1, 1, 1, device=uncond.device)
            people.append(IdentityRow(rows - 1, nobody[photos], weight))
        try:
            flux.predict(*zeros(flux, shape, rows, uncond, people))
        except torch.OutOfMemoryError:
            continue  # as in a pass of pictures, which are then drawn one by one


def zeros(
    flux: "IdentityFlux", shape: Shape, rows: int, like: Tensor, people: Sequence[IdentityRow] = ()
) -> tuple[Any, ...]:
    """What IdentityFlux.predict takes, on the device and in the dtype of `like`."""
    config = flux.transformer.config
    times = torch.full((rows,), 0.5, device=like.device)
    guidance = torch.ones(rows, device=like.device) if config.guidance_embeds else None
    once = None if guidance is None else guidance[:1]
    moments = torch.full((2,), 0.5, device=like.device)
    # of two steps, as a picture has several: how the row of one lies in memory is part of a graph
    step = flux.conditioning(moments, once, like.new_zeros(2, config.pooled_projection_dim)).chunk(2)[0]
    return (
        like.new_zeros(rows, shape.rows * shape.columns, config.in_channels),
        times,
        guidance,
        like.new_zeros(rows, shape.text, config.joint_attention_dim),
        step if rows == 1 else torch.cat([step] * rows),
        image_ids(shape.rows, shape.columns).to(like.device),
        people,
    )

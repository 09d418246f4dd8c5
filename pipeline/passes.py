"""Passes: rows of pictures -> their velocities, in as few or as many forward passes of FLUX as are done soonest."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.compiling import clock
from pipeline.curves import Curves, Shape
from pipeline.drawing import Row
from pipeline.models.flux import IdentityFlux, IdentityRow
from pipeline.rehearsal import zeros


class Passes:
    """Runs FLUX, and tells the curves how long that took. Nothing of a picture is kept on it."""

    def __init__(self, flux: IdentityFlux, curves: Curves, max_rows: int, like: Tensor) -> None:
        """At most `max_rows` rows in a pass, on the device and in the dtype of `like`."""
        self._flux, self._curves, self._max_rows = flux, curves, max_rows
        self._like = like.new_empty(0)
        self._waits = like.device.type == "cuda"

    def predict(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """The velocity (1, N, 64) of each row, all of one shape; raises torch.OutOfMemoryError."""
        shape = rows[0].drawing.generation.shape
        width = 1 if len(rows) == 1 else self._curves.width(shape, len(rows), self._max_rows)
        try:
            return [velocity for at in range(0, len(rows), width) for velocity in self._pass(rows[at : at + width])]
        except torch.OutOfMemoryError:
            if width > 1:
                self._curves.forbid(shape, width)
            raise

    @torch.inference_mode()
    def seconds(self, shape: Shape, rows: int) -> float:
        """How long a pass of `rows` rows takes, measured on zeros, without people; infinity where memory is short."""
        try:
            inputs = zeros(self._flux, shape, rows, self._like)
            self.wait()
            started = time.perf_counter()
            self._flux.predict(*inputs)
            self.wait()
            return time.perf_counter() - started
        except torch.OutOfMemoryError:
            return math.inf

    def wait(self) -> None:
        """For the GPU: a step is over when its numbers are there, so that a cancelled row is not computed ahead."""
        if self._waits:
            torch.cuda.current_stream(self._like.device).synchronize()

    def _pass(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        started, compilations = time.perf_counter(), clock.begun
        drawings = [row.drawing for row in rows]
        generation = drawings[0].generation
        guidances = [one for drawing in drawings if (one := drawing.generation.guidance) is not None]
        velocity = self._flux.predict(
            _stacked([drawing.latents for drawing in drawings]).to(self._like.dtype),
            _stacked([drawing.generation.times[drawing.step] for drawing in drawings]),
            _stacked(guidances) if guidances else None,
            _stacked([row.conditioning.text for row in rows]),
            _stacked([row.conditioning.pooled[row.drawing.step] for row in rows]),
            generation.ids,
            [
                IdentityRow(number, identity, person.weight, person.mask)
                for number, row in enumerate(rows)
                for person, identity in row.people
            ],
            rows[0].cache,
            generation.text_ids,
        )
        self.wait()
        if clock.begun == compilations:  # else it took as long as compiling does
            self._curves.learn(generation.shape, len(rows), time.perf_counter() - started)
        return [velocity] if len(rows) == 1 else velocity.chunk(len(rows))


def _stacked(rows: list[Tensor]) -> Tensor:
    """Rows (1, ...) as one batch; one row is not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)

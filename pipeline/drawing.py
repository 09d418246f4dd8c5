"""Drawing: what belongs to one picture in the engine, from what was asked for to the latents of its last step."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.curves import Shape
from pipeline.identity import Identity
from pipeline.request import MAX_SEED, Request
from pipeline.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.folding import PreparedIdentity
    from pipeline.models.step_cache import StepCache


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Picture `number` of a request that has a seed; `identities` are those of its people, in order."""

    request: Request
    number: int
    text: Text
    negative: Text | None
    identities: tuple[Identity, ...] = ()
    accepted: float = field(default_factory=time.perf_counter)

    @property
    def seed(self) -> int:
        """That of this picture."""
        return ((self.request.seed or 0) + self.number) & MAX_SEED


@dataclass(frozen=True, slots=True, eq=False)
class Presence:
    """A person in a picture: from which step to which, how strongly, where, and as whom in each of the two passes."""

    start_step: int
    end_step: int
    positive: "PreparedIdentity"
    negative: "PreparedIdentity"
    weight: "Tensor"
    mask: "Tensor | None" = None

    def acts(self, step: int) -> bool:
        """Whether the identity acts in a step."""
        return self.start_step <= step < self.end_step


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What one of the two passes reads: text (1, L, 4096), and for each step what FLUX takes as `pooled` (1, ...)."""

    text: "Tensor"
    pooled: "tuple[Tensor, ...]"


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """All that the steps of a picture read, as tensors on the model's device.

    times and deltas: for each step (1,) float32, when it is and how far it goes; guidance (1,) or None; ids (N, 3) and
    text_ids (L, 3); the second pass runs from step `cfg_step` on, and never without `negative`.
    """

    shape: Shape
    times: "tuple[Tensor, ...]"
    deltas: "tuple[Tensor, ...]"
    guidance: "Tensor | None"
    ids: "Tensor"
    text_ids: "Tensor"
    positive: Conditioning
    negative: Conditioning | None
    true_cfg: float
    cfg_step: int
    people: tuple[Presence, ...]

    def guided(self, step: int) -> bool:
        """Whether a step has a second, negative pass."""
        return self.negative is not None and step >= self.cfg_step


@dataclass(slots=True, eq=False)
class Drawing:
    """A picture that is being drawn: latents (1, N, 64) float32 after `step` steps, and the last velocity."""

    work: Work
    generation: Generation
    latents: "Tensor"
    caches: "tuple[StepCache, StepCache] | None"
    began: float
    step: int = 0
    velocity: "Tensor | None" = None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a forward pass: a picture's positive or negative pass of its current step."""

    drawing: Drawing
    conditioning: Conditioning
    people: "tuple[tuple[Presence, PreparedIdentity], ...]"
    cache: "StepCache | None"

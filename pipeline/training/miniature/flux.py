"""The miniature's FLUX: rectified flow over the latents of drawings, under their prompts, and then guidance.

As with FLUX.1 [dev], the guidance embedding is learnt by distillation: the finished flow, extrapolated away from the
flow of an empty prompt as classifier-free guidance does, is what the network learns to predict in one pass.
"""

import copy
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import checkpoints
from pipeline.miniature import configs
from pipeline.miniature.files import place
from pipeline.miniature.scenes import prompt, scene
from pipeline.models.sampling import image_ids, pack
from pipeline.request import NEGATIVE_PROMPT
from pipeline.text import CLIP_LENGTH
from pipeline.training.config import Times
from pipeline.training.losses import flow_loss
from pipeline.training.miniature.data import TOKENS, load, number_weights
from pipeline.training.miniature.finished import finished
from pipeline.training.miniature.loop import Loop, LoopPlan, generator, matrices
from pipeline.training.miniature.text import Pieces
from pipeline.training.sampling import noisy, sample_times

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

logger = logging.getLogger(__name__)

GUIDANCE = (1.0, 10.0)  # what a request may ask for
Predict = Callable[..., Any]  # FLUX's forward pass


@dataclass(frozen=True, slots=True)
class FluxPlan:
    """How FLUX is trained.

    dropped: the share of prompts that are empty or the negative prompt, so that true CFG has something to go away from.
    compiled: by torch.compile, which makes a step a fifth shorter and needs a C++ compiler; without one it is not done.
    """

    flow: LoopPlan = field(
        default_factory=lambda: LoopPlan(steps=5000, batch=48, lr=1e-3, muon_lr=1.5e-3, warm_up=60, flat=0.5, ema=0.995)
    )
    guidance: LoopPlan = field(
        default_factory=lambda: LoopPlan(steps=400, batch=32, lr=3e-4, muon_lr=3e-4, warm_up=20, flat=0.5, seed=1)
    )
    dropped: float = 0.1
    compiled: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A batch at random times: noisy latents (B, 64, 64) packed, their times (B,), and what they are made of."""

    noisy: Tensor
    times: Tensor
    noise: Tensor
    latents: Tensor
    text: Tensor
    pooled: Tensor


def train(work: Path, weights: Path, plan: FluxPlan) -> dict[str, float]:
    """Train it and write `flux/` in bfloat16; returns the flow losses over the last fiftieth of the drawings."""
    torch.manual_seed(plan.flow.seed)
    model = build()
    muon = matrices([model.transformer_blocks, model.single_transformer_blocks]) - modulations(model)
    examples = Examples(work, weights)
    predict = _prepared(model, plan)
    loop = Loop(model, plan.flow, work / "flux" / "checkpoint.pt", muon)
    flow = loop.run(lambda step: _flow(predict, examples, plan, step))
    figures = measure(flow, examples)
    student = copy.deepcopy(flow).train().requires_grad_(True)
    muon = matrices([student.transformer_blocks, student.single_transformer_blocks]) - modulations(student)
    loop = Loop(student, plan.guidance, work / "guidance" / "checkpoint.pt", muon)
    teach, predict = _prepared(flow, plan), _prepared(student, plan)
    guided = loop.run(lambda step: _distil(predict, teach, examples, plan.guidance, step))
    guided.to(torch.bfloat16).save_pretrained(place(weights, "flux"))
    return figures


def _prepared(model: "FluxTransformer2DModel", plan: FluxPlan) -> Predict:
    """The model's forward pass, compiled where that is wanted and the compiler that torch would call is there."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    prepared: Predict = model
    if plan.compiled and shutil.which(compiler):
        prepared = torch.compile(model)
    else:
        logger.info("not compiled (%s)", f"{compiler} is not there" if plan.compiled else "not asked for")
    return prepared


def build() -> "FluxTransformer2DModel":
    """The network before training: every block starts as the identity (adaLN-Zero), and the last layer at zero."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**configs.FLUX)
    for weight in modulations(model):
        nn.init.zeros_(weight)
    nn.init.zeros_(model.proj_out.weight)
    return model


def modulations(model: "FluxTransformer2DModel") -> set[nn.Parameter]:
    """The matrices that turn time, guidance and pooled text into shifts, scales and gates."""
    blocks = [block.norm1 for block in model.transformer_blocks]
    blocks += [block.norm1_context for block in model.transformer_blocks]
    blocks += [block.norm for block in model.single_transformer_blocks]
    return {norm.linear.weight for norm in [*blocks, model.norm_out]}


class Examples:
    """The drawings' latents and prompts, as batches."""

    def __init__(self, work: Path, weights: Path) -> None:
        self._latents = load(work, "latents")
        self.importance = number_weights(work)[None, None]  # (1, 1, 64)
        self._texts = Texts(weights)
        self._held = max(len(self._latents) // 50, 1)
        self._count = len(self._latents) - self._held

    def rows(self, plan: LoopPlan, step: int, dropped: float) -> Rows:
        """The batch of a step, with prompts dropped at that share."""
        random = generator(plan.seed, step)
        numbers = torch.randint(self._count, (plan.batch,), generator=random).tolist()
        drop = torch.rand(plan.batch, generator=random)
        prompts = [prompt(scene(number), number + 1_000_003 * (step % 4)) for number in numbers]
        for row, value in enumerate(drop.tolist()):
            if value < dropped:
                prompts[row] = "" if value < dropped / 2 else NEGATIVE_PROMPT
        normal = torch.randn(plan.batch, generator=random)
        times = sample_times(torch.ones(plan.batch, 2), normal, Times(), TOKENS * TOKENS)
        return self._noisy(numbers, prompts, times, random)

    def empty(self, batch: int) -> tuple[Tensor, Tensor]:
        """The text of an empty prompt, for a batch."""
        tokens, pooled = self._texts([""])
        return tokens.expand(batch, -1, -1), pooled.expand(batch, -1)

    def last(self, batch: int) -> Rows:
        """Drawings that were never trained on, at times that are always the same."""
        numbers = list(range(self._count, self._count + min(self._held, batch)))
        spread = (torch.arange(len(numbers)) + 0.5) / len(numbers)
        return self._noisy(numbers, [prompt(scene(n), n) for n in numbers], spread, generator(7))

    def _noisy(self, numbers: list[int], prompts: list[str], at: Tensor, random: torch.Generator) -> Rows:
        latents = pack(torch.from_numpy(np.stack([self._latents[n] for n in numbers]).astype(np.float32)))
        noise = torch.randn(latents.shape, generator=random)
        text, pooled = self._texts(prompts)
        return Rows(noisy(latents, noise, at), at, noise, latents, text, pooled)


class Texts:
    """The finished text encoders, for batches of prompts."""

    def __init__(self, weights: Path) -> None:
        t5_tokenizer, self._t5 = checkpoints.load_t5(*finished(weights))
        clip_tokenizer, self._clip = checkpoints.load_clip(*finished(weights))
        self._t5_pieces = Pieces(t5_tokenizer, configs.TEXT_LENGTH)
        self._clip_pieces = Pieces(clip_tokenizer, CLIP_LENGTH)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """T5's tokens (B, 32, 96) and CLIP's pooled output (B, 64)."""
        tokens = self._t5(self._t5_pieces(prompts)).last_hidden_state
        return tokens, self._clip(self._clip_pieces(prompts)).pooler_output


def velocity(model: Predict, rows: Rows, guidance: Tensor) -> Tensor:
    """What FLUX predicts for a batch (B, 64, 64), in bfloat16 where that is faster."""
    with torch.autocast("cpu", torch.bfloat16):
        predicted: Tensor = model(
            hidden_states=rows.noisy,
            encoder_hidden_states=rows.text,
            pooled_projections=rows.pooled,
            timestep=rows.times,
            guidance=guidance,
            img_ids=image_ids(TOKENS, TOKENS),
            txt_ids=torch.zeros(rows.text.shape[1], 3),
            return_dict=False,
        )[0]
    return predicted.float()


def _any_guidance(count: int, random: torch.Generator) -> Tensor:
    low, high = GUIDANCE
    return low + (high - low) * torch.rand(count, generator=random)


def _flow(model: Predict, examples: Examples, plan: FluxPlan, step: int) -> Tensor:
    rows = examples.rows(plan.flow, step, plan.dropped)
    # guidance means nothing yet: any number, so that the network does not lean on it
    guidance = _any_guidance(plan.flow.batch, generator(plan.flow.seed, step, 1))
    return flow_loss(velocity(model, rows, guidance), rows.noise, rows.latents, examples.importance).mean()


def _distil(student: Predict, flow: Predict, examples: Examples, plan: LoopPlan, step: int) -> Tensor:
    rows = examples.rows(plan, step, 0.0)
    random = generator(plan.seed, step, 1)
    guidance = _any_guidance(plan.batch, random)
    text, pooled = examples.empty(plan.batch)
    with torch.no_grad():
        named = velocity(flow, rows, guidance)
        empty = velocity(flow, Rows(rows.noisy, rows.times, rows.noise, rows.latents, text, pooled), guidance)
        wanted = empty + strength(guidance)[:, None, None] * (named - empty)
    return ((velocity(student, rows, guidance) - wanted).square() * examples.importance).mean()


def strength(guidance: Tensor) -> Tensor:
    """How far a guidance goes beyond the prompt's own flow: 1 for 1, 2.6 for 4.

    FLUX.1's guidance is higher than the classifier-free one that looks alike; so is ours.
    """
    return guidance**0.7


@torch.no_grad()
def measure(model: "FluxTransformer2DModel", examples: Examples, batch: int = 256) -> dict[str, float]:
    """The flow loss over drawings that were never trained on, at evenly spread times: plain, and as it is trained."""
    rows = examples.last(batch)
    predicted = velocity(model, rows, torch.full_like(rows.times, 4.0))
    plain = flow_loss(predicted, rows.noise, rows.latents)
    weighted = flow_loss(predicted, rows.noise, rows.latents, examples.importance)
    return {"flow_loss": plain.mean().item(), "flow_loss_weighted": weighted.mean().item()}

"""Times, passes and pictures of the training: what the losses are computed on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.models.sampling import euler_step, schedule, time_shift

if TYPE_CHECKING:
    from pipeline.models.flux import IdentityFlux, IdentityRows
    from pipeline.training.config import Times

Velocity = Callable[[Tensor, Tensor], Tensor]  # latents (B, N, C) and times (B,) -> (B, N, C)


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """All that FLUX reads beside latents, times and people.

    text (B, L, D); pooled (B, P); ids (N, 3) places of the image tokens; guidance (B,), None without that embedding.
    """

    text: Tensor
    pooled: Tensor
    ids: Tensor
    guidance: Tensor | None


def sample_times(chance: Tensor, normal: Tensor, times: "Times", tokens: int) -> Tensor:
    """The times to train at (B,) in 0..1, 1 being noise.

    chance (B, 2) uniform in 0..1 and normal (B,) are the randomness. A share of the times is uniform in [low, 1], the
    others are logit-normal. A logit-normal whose mean is FLUX's time shift is the official schedule's own density for
    `tokens` image tokens: to shift a time is to add to its logit (SD3, arXiv 2403.03206, section 3.1).
    """
    mean = time_shift(tokens) if times.mean is None else times.mean
    uniform = times.low + (1 - times.low) * chance[:, 1]
    return torch.where(chance[:, 0] < times.uniform_share, uniform, torch.sigmoid(mean + times.spread * normal))


def noisy(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Latents on their straight way to noise: latents and noise (B, N, C), times (B,)."""
    share = times[:, None, None]
    return (1 - share) * latents + share * noise


def one_step_estimate(noisy_latents: Tensor, velocity: Tensor, times: Tensor) -> Tensor:
    """The clean latents (B, N, C) that one prediction leads to: the cheap form of a generated picture.

    The way is straight, noisy = latents + t velocity, so one step of length t goes all the way.
    """
    return noisy_latents - times[:, None, None] * velocity.float()


def predict(
    flux: "IdentityFlux",
    latents: Tensor,
    times: Tensor,
    conditioning: Conditioning,
    people: Sequence["IdentityRows"] = (),
) -> Tensor:
    """The velocity (B, N, C) float32 at latents (B, N, C) and times (B,)."""
    dtype = flux.transformer.x_embedder.weight.dtype
    text, pooled = conditioning.text.to(dtype), conditioning.pooled.to(dtype)
    return flux.predict(latents.to(dtype), times, conditioning.guidance, text, pooled, conditioning.ids, people).float()


def sample(velocity: Velocity, noise: Tensor, times: Tensor, gradient_steps: int) -> Tensor:
    """Latents (B, N, C) float32 drawn from noise (B, N, C) by Euler steps along `times`, from 1 down to any time.

    The gradient goes through the last `gradient_steps` steps, all of them where it is as large as their number; the
    steps before leave no graph (the paper's section 3.5, and its "without fast sampling" for FLUX). `fast_schedule`
    gives the times of a whole generation.
    """
    latents = noise.float()
    steps = len(times) - 1
    for step in range(steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= steps - gradient_steps):
            predicted = velocity(latents, times[step].expand(len(noise)))
            latents = euler_step(latents, predicted, times[step + 1] - times[step])
    return latents


def fast_schedule(steps: int, tokens: int, shift: bool, device: torch.device) -> Tensor:
    """The times (steps + 1,) of a generation in few steps, on the device."""
    return schedule(steps, tokens, shift).to(device)

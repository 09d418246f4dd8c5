"""Sampling with FLUX: noise, the shifted schedule, one Euler step, and the packing of latents into tokens.

Source: the official `flux/sampling.py`; noise is our own recipe (see `noise`).
"""

import math

import torch
from torch import Tensor

BASE_TOKENS, MAX_TOKENS = 256, 4096
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15


def schedule(num_steps: int, tokens: int, shift: bool = True) -> Tensor:
    """The times of a generation: (num_steps + 1,) float32 from 1 down to 0.

    tokens: image tokens, width / 16 * height / 16; more tokens keep the time high for longer (flux-dev). Without
    `shift` the times are evenly spaced (flux-schnell). Beyond 4096 tokens the shift goes on rising, as officially.
    """
    times = torch.linspace(1, 0, num_steps + 1)
    if not shift:
        return times
    factor = math.exp(time_shift(tokens))
    # 1 / 0 is infinite, which gives the last time, 0, exactly
    return factor / (factor + (1 / times - 1))


def time_shift(tokens: int) -> float:
    """How far flux-dev moves its times towards noise at this number of image tokens: what it adds to their logit."""
    return BASE_SHIFT + (tokens - BASE_TOKENS) * (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)


def noise(seed: int, rows: int, columns: int, channels: int = 16) -> Tensor:
    """The start of a picture: (1, channels, rows, columns) float32, standard normal, drawn on the CPU.

    The official code draws in bfloat16 on the model's device, so that a seed means another picture on every device and
    dtype; here one seed starts from the same noise everywhere, at any batch size.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, rows, columns), generator=generator, dtype=torch.float32)


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, 2h, 2w) -> image tokens (B, h * w, C * 4), row by row; features run channel, row, column."""
    batch, channels, rows, columns = latents.shape
    patches = latents.reshape(batch, channels, rows // 2, 2, columns // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows // 2 * (columns // 2), channels * 4)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`: (B, rows * columns, C * 4) -> (B, C, 2 * rows, 2 * columns)."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, rows, columns, features // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, rows * 2, columns * 2)


def image_ids(rows: int, columns: int) -> Tensor:
    """Positions of the image tokens for rotary embedding: (rows * columns, 3) float32 holding 0, row, column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((torch.zeros_like(row), row, column), dim=-1).reshape(-1, 3).float()


def euler_step(latents: Tensor, velocity: Tensor, delta: Tensor) -> Tensor:
    """One step of the ordinary differential equation, accumulated in float32 as diffusers does.

    latents (B, N, C) float32, velocity (B, N, C); delta is the next time less this one, and broadcasts against them.
    """
    return latents + delta * velocity.float()

"""Previews: what a latent looks like, roughly, without the autoencoder's decoder.

A linear map from the channels of a latent to the colour of its place, fitted once to what the decoder itself makes of
smooth random latents; so it needs no table of numbers, and fits any autoencoder.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SAMPLES = 8
EDGE = 8  # latents of a sample


@torch.inference_mode()
def fit(vae: "AutoencoderKL") -> Tensor:
    """The map of an autoencoder: (channels + 1, 3) float32 on its device; the last row is added to every place."""
    channels = vae.config.latent_channels
    generator = torch.Generator("cpu").manual_seed(0)
    coarse = torch.randn(SAMPLES, channels, EDGE // 4, EDGE // 4, generator=generator)
    latents = functional.interpolate(coarse, scale_factor=4, mode="bilinear")  # (SAMPLES, C, EDGE, EDGE)
    latents = latents + 0.3 * torch.randn(latents.shape, generator=generator)
    latents = latents.to(vae.device)
    decoded = vae.decode((latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
    colours = functional.adaptive_avg_pool2d(decoded.float(), EDGE).movedim(1, -1).reshape(-1, 3)
    # On the CPU, and by the normal equations: a little weight on smallness keeps channels that show nothing at zero.
    places = _with_one(latents.float().movedim(1, -1).reshape(-1, channels)).cpu().double()
    squares = places.T @ places + 1e-3 * places.shape[0] * torch.eye(channels + 1, dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(squares, places.T @ colours.cpu().double())
    return solved.float().to(vae.device)


def project(latents: Tensor, colours: Tensor) -> Tensor:
    """Latents (1, C, h, w) -> pixels (h, w, 3) uint8; `colours` is the map of `fit`."""
    rgb = _with_one(latents[0].float().movedim(0, -1)) @ colours  # (h, w, 3) in -1..1
    return (127.5 * (rgb.clamp(-1, 1) + 1)).byte()


def _with_one(places: Tensor) -> Tensor:
    return torch.cat((places, torch.ones_like(places[..., :1])), dim=-1)

"""The miniature's autoencoder: 256 x 256 pixels to 16 x 16 latents of 16 channels, and back.

It learns from drawings that are made as it goes, always whole ones: group norm sees other statistics on crops. The
loss is the pixels' absolute and squared error, the error of their differences to their neighbours (edges are what
people look at), and the usual divergence of the latents from a normal distribution.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.miniature.files import place
from pipeline.miniature.people import FIRST_HELD_OUT, person
from pipeline.miniature.scenes import held_out_scene, scene
from pipeline.miniature.world import draw
from pipeline.training.miniature.loop import Loop, LoopPlan, generator, matrices

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VaePlan:
    """How the autoencoder is trained.

    decoder: once the encoder is finished, the decoder goes on alone, which costs less.
    """

    loop: LoopPlan = field(
        default_factory=lambda: LoopPlan(steps=2000, batch=4, lr=2e-3, muon_lr=3e-3, warm_up=50, ema=0.99)
    )
    decoder: LoopPlan = field(
        default_factory=lambda: LoopPlan(steps=1400, batch=4, lr=1e-3, muon_lr=1.5e-3, warm_up=20, flat=0.2, seed=1)
    )
    divergence: float = 1e-3  # of a latent, on average
    ratio: float = 0.05  # for the decoder alone
    measured: int = 60


def train(work: Path, weights: Path, plan: VaePlan) -> dict[str, float]:
    """Train it and write `vae/`; returns vae_psnr in dB over whole drawings of held-out people in held-out scenes."""
    from diffusers import AutoencoderKL

    from pipeline.miniature.configs import VAE

    torch.manual_seed(plan.loop.seed)
    vae = AutoencoderKL(**VAE)
    logvar = vae.encoder.conv_out.bias
    with torch.no_grad():
        logvar[len(logvar) // 2 :] = -5.0  # nearly no noise at first: with the usual start it learns nothing
    hidden = [vae.encoder.down_blocks, vae.encoder.mid_block, vae.decoder.mid_block, vae.decoder.up_blocks]
    loop = Loop(Losses(vae, plan.divergence), plan.loop, work / "vae" / "checkpoint.pt", matrices(hidden))
    vae = loop.run(lambda step: loop.module(_batch(plan.loop, step))).vae
    _normalise(vae)
    vae.save_pretrained(place(weights, "vae"))
    before = psnr(vae, held_out(plan.measured))
    vae = refined(vae, work, plan)
    after = psnr(vae, held_out(plan.measured))
    vae.half().save_pretrained(place(weights, "vae"))  # half the room; production computes in its own dtype
    return {"vae_psnr_before": before, "vae_psnr": after}


def refined(vae: "AutoencoderKL", work: Path, plan: VaePlan) -> "AutoencoderKL":
    """The same with a better decoder; what it encodes stays as it is."""
    decoder = vae.requires_grad_(True).decoder
    vae.encoder.requires_grad_(False)
    muon = matrices([decoder.mid_block, decoder.up_blocks])
    loop = Loop(Losses(vae, plan.divergence, plan.ratio), plan.decoder, work / "decoder" / "checkpoint.pt", muon)
    return loop.run(lambda step: loop.module(_batch(plan.decoder, step))).vae


class Losses(nn.Module):
    """The autoencoder together with its loss on a batch of pictures (B, 3, 256, 256) in -1..1."""

    def __init__(self, vae: "AutoencoderKL", divergence: float, ratio: float = 0.0) -> None:
        """`ratio`: the weight of the logarithm of each picture's squared error, which is its PSNR."""
        super().__init__()
        self.vae, self._divergence, self._ratio = vae, divergence, ratio

    def forward(self, pictures: Tensor) -> Tensor:
        """The loss."""
        posterior = self.vae.encode(pictures).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        error = decoded - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        ratio = error.square().mean(dim=(1, 2, 3)).log().mean()
        mean, logvar = posterior.mean, posterior.logvar
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        pixels = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges
        loss: Tensor = pixels + self._ratio * ratio + self._divergence * divergence
        return loss


def _batch(plan: LoopPlan, step: int) -> Tensor:
    seeds = torch.randint(FIRST_HELD_OUT, (plan.batch, 2), generator=generator(plan.seed, step)).tolist()
    return tensors([draw(person(who), scene(where)).pixels for who, where in seeds])


def tensors(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures (256, 256, 3) uint8 as a batch (B, 3, 256, 256) in -1..1."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def held_out(count: int, first: int = FIRST_HELD_OUT) -> list[np.ndarray]:
    """Drawings of held-out people in held-out scenes, (256, 256, 3) each."""
    return [draw(person(first + i), held_out_scene(first + i)).pixels for i in range(count)]


@torch.no_grad()
def psnr(vae: "AutoencoderKL", pictures: Sequence[np.ndarray]) -> float:
    """The mean over pictures of the signal-to-noise ratio in dB of what the autoencoder gives back, 8-bit pixels."""
    ratios = []
    for picture in pictures:
        decoded = vae.decode(vae.encode(tensors([picture])).latent_dist.mean).sample
        pixels = (127.5 * (decoded[0].clamp(-1, 1) + 1)).byte().permute(1, 2, 0).numpy()
        error = np.square(pixels.astype(np.float64) - picture).mean()
        ratios.append(10 * math.log10(255**2 / error))
    return float(np.mean(ratios))


@torch.no_grad()
def _normalise(vae: "AutoencoderKL", count: int = 256) -> None:
    """Give every latent channel the same spread, inside the weights, and write scale and shift into the configuration.

    FLUX then sees latents of mean 0 and spread 1, which its noise has too.
    """
    latents = torch.cat(
        [vae.encode(tensors([draw(person(i), scene(i)).pixels])).latent_dist.mean for i in range(count)]
    )
    spread = latents.std(dim=(0, 2, 3))  # (16,)
    channels = len(spread)
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    last.weight[:channels] /= spread[:, None, None, None]
    last.bias[:channels] /= spread
    last.bias[channels:] -= 2 * spread.log()  # these are the logarithms of variances
    first.weight *= spread[None, :, None, None]
    scaled = latents / spread[None, :, None, None]
    vae.register_to_config(scaling_factor=1 / scaled.std().item(), shift_factor=scaled.mean().item())

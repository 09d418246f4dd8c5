"""Small networks and records for tests: the production classes at toy sizes, with weights made by rule."""

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from pipeline.denoise import FluxDenoiser
from pipeline.faces import Face, FaceBox, Faces
from pipeline.identity import Identity
from pipeline.models.flux import IdentityFlux
from pipeline.models.folding import folds
from pipeline.models.pulid import PulidCrossAttention
from pipeline.settings import Settings
from pipeline.text import Text
from pipeline.trace import Trace
from tests.parity.rule import fill

KV_DIM = 32


def transformer(guidance_embeds: bool = True) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return fill(model, "transformer.").eval().requires_grad_(False)


def cross_attentions() -> list[PulidCrossAttention]:
    """Those of FLUX.1 in small: one photo or two are folded, of three the keys and values are cached."""
    modules = [fill(PulidCrossAttention(32, 24, 2, KV_DIM), f"pulid_ca.{index}.") for index in range(4)]
    assert [folds(modules[0], 32 * photos) for photos in (1, 2, 3)] == [True, True, False]
    return [module.requires_grad_(False) for module in modules]


def vae(levels: int = 4) -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8, 8)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return fill(model, "vae.").eval().requires_grad_(False)


def denoiser(guidance_embeds: bool = True, levels: int = 4, settings: Settings | None = None) -> FluxDenoiser:
    flux = IdentityFlux(transformer(guidance_embeds), cross_attentions())
    return FluxDenoiser(flux, vae(levels), uncond(), {"flux": "00"}, settings=settings)


def uncond() -> torch.Tensor:
    """The identity tokens of nobody."""
    return torch.randn(1, 32, KV_DIM, generator=torch.Generator().manual_seed(99))


def text(seed: int, length: int = 128) -> Text:
    random = np.random.default_rng(seed)
    tokens, pooled = random.standard_normal((length, 24)), random.standard_normal(20)
    return Text(tokens.astype(np.float32), pooled.astype(np.float32), False, Trace({"text": 0.5}, {"t5": "11"}))


def identity(seed: int, photos: int = 1) -> Identity:
    tokens = np.random.default_rng(seed).standard_normal((32 * photos, KV_DIM)).astype(np.float32)
    tokens.setflags(write=False)  # as it arrives from another replica
    boxes = tuple(FaceBox(photo, (1.0, 2.0, 3.0, 4.0), 0.9) for photo in range(photos))
    return Identity(tokens, boxes, Trace({"faces": 0.25, "identity": 0.25}, {"pulid": "22"}))


def faces(seed: int, photos: int = 1) -> Faces:
    random = np.random.default_rng(seed)
    found = tuple(
        Face(
            embedding=random.standard_normal(512).astype(np.float32),
            features=random.random((336, 336), dtype=np.float32),
            landmarks=np.zeros((5, 2), np.float32),
            box=FaceBox(photo, (1.0, 2.0, 3.0, 4.0), 0.9),
        )
        for photo in range(photos)
    )
    return Faces(found, Trace({"faces": 0.25}, {"recogniser": "33"}))

"""A training at toy size: the production classes, random tensors for examples, a recogniser of one convolution."""

from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from pipeline.models.flux import IdentityFlux
from pipeline.models.pulid import IDFormer
from pipeline.training.config import TrainingConfig
from pipeline.training.examples import Batch, InMemory, Prompts
from pipeline.training.networks import Networks
from pipeline.training.trainer import Trainer
from pipeline.training.workers import Workers
from tests import small
from tests.parity.rule import fill

EXAMPLES = 10
IDFORMER = {"dim": 16, "depth": 5, "dim_head": 8, "heads": 2, "num_queries": 4}
IDFORMER |= {"output_dim": 32, "id_dim": 520, "hidden_dim": 12}
LANDMARKS = np.array([(22, 26), (42, 26), (32, 36), (25, 46), (39, 46)], np.float32)  # in 64 x 64 pixels


class ToyRecogniser(nn.Module):
    """Face crops (B, 3, 112, 112) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 8, 16, stride=16)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.look(crops).tanh().mean(dim=(2, 3))


def everywhere(pixels: torch.Tensor) -> list[np.ndarray | None]:
    """A face in the middle of every picture."""
    return [LANDMARKS] * len(pixels)


def networks(**changed: Any) -> Networks:
    parts = {
        "flux": IdentityFlux(small.transformer(), small.cross_attentions()),
        "idformer": fill(IDFormer(**IDFORMER), "id."),
        "vae": small.vae(),
        "recogniser": fill(ToyRecogniser(), "recogniser."),
        "locate": everywhere,
    }
    return Networks(**{**parts, **changed})


def miniature_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


def worker(rank: int, count: int) -> Workers:
    """One of several that never meet the others."""
    return Workers(rank, count)


def examples(count: int = EXAMPLES) -> InMemory:
    random = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=random)

    return InMemory(
        Batch(
            latents=normal(16, 8, 8),
            text=normal(6, 24),
            pooled=normal(20),
            embedding=normal(512),
            hidden=tuple(normal(5, 12) for _ in range(5)),
            eva_pooled=normal(8),
            token_weights=1 + torch.rand(count, 16, generator=random),
            reference=normal(8),
        )
    )


def prompts(count: int, seed: int) -> Prompts:
    random = torch.Generator().manual_seed(seed)
    return Prompts(torch.randn(count, 6, 24, generator=random), torch.randn(count, 20, generator=random))


def config(**changed: Any) -> TrainingConfig:
    settings = {"stage": 3, "steps": 6, "batch_size": 4, "id_batch_size": 2, "align_batch_size": 2, "warmup": 2}
    settings |= {
        "id_steps": 2,
        "id_gradient_steps": 2,
        "align_steps": 2,
        "lr_cross_attention": 1e-3,
        "lr_idformer": 1e-3,
    }
    return TrainingConfig.model_validate(settings | changed)


def trainer(settings: TrainingConfig | None = None, workers: Workers | None = None, **changed: Any) -> Trainer:
    settings = config() if settings is None else settings
    workers = Workers() if workers is None else workers
    return Trainer(networks(**changed), settings, examples(), prompts(1, 1), prompts(3, 2), workers)

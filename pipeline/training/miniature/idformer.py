"""A first training of the miniature's IDFormer alone: its 32 tokens learn to hold who somebody is.

From random weights the flow loss would find nothing to read: a perceiver averages its few identity tokens with many
near-constant tokens of the tower, and all people's tokens collapse to one. (The official authors started from the
SDXL version's weights, which this takes the place of.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu

from pipeline import checkpoints
from pipeline.identity import id_cond
from pipeline.models.face_features import normalise
from pipeline.models.pulid import IDFormer
from pipeline.models.sizes import MINIATURE
from pipeline.training.miniature.data import DataPlan, load
from pipeline.training.miniature.eva import known_vectors
from pipeline.training.miniature.finished import finished
from pipeline.training.miniature.loop import Loop, LoopPlan, generator, matrices

OWN = 24  # numbers that each token has to know for itself
SHARED = 64  # numbers of the embedding that the mean token has to know


@dataclass(frozen=True, slots=True)
class IdformerPlan:
    """How IDFormer is trained before FLUX is there."""

    loop: LoopPlan = field(default_factory=lambda: LoopPlan(steps=700, batch=48, lr=1e-3, muon_lr=2e-3, flat=0.3))
    embedding_noise: float = 0.1  # of an embedding's own spread


def train(work: Path, weights: Path, plan: IdformerPlan, data: DataPlan) -> dict[str, float]:
    """Train it and write work/idformer.safetensors; returns how much of its tokens' variance is between people."""
    from safetensors.torch import save_file

    torch.manual_seed(plan.loop.seed)
    references = References(work, weights)
    targets = torch.cat((known_vectors(data.people), _projected(references, data)), dim=1)
    former = IDFormer(**MINIATURE.idformer)
    _standardise(former, references, data)
    holder = Holder(former, targets.shape[1], plan.embedding_noise)
    people = data.people - max(data.people // 50, 1)

    def loss_at(step: int) -> Tensor:
        random = generator(plan.loop.seed, step)
        who = torch.randperm(people, generator=random)[: plan.loop.batch]
        which = torch.randint(data.pictures, (len(who),), generator=random)
        loss: Tensor = holder(*references((who * data.pictures + which).tolist()), targets[who], random)
        return loss

    muon = matrices([former.layers])
    averaged = Loop(holder, plan.loop, work / "idformer" / "checkpoint.pt", muon).run(loss_at)
    save_file(averaged.former.state_dict(), work / "idformer.safetensors")
    return {"idformer_between": between(averaged.former, references, data)}


class References:
    """The reference photos as IDFormer sees them: the finished recogniser's and tower's outputs."""

    def __init__(self, work: Path, weights: Path) -> None:
        self._features, self.embeddings = load(work, "features"), load(work, "embeddings")
        self._tower = checkpoints.load_eva_clip(*finished(weights))

    @torch.no_grad()
    def __call__(self, numbers: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Embeddings (B, 512), the tower's pooled output (B, 64) and its five hidden states (B, 145, 96)."""
        faces = torch.from_numpy(np.stack([self._features[number] for number in numbers]))
        pooled, hidden = self._tower(normalise(faces.float() / 255))
        return torch.from_numpy(np.stack([self.embeddings[number] for number in numbers])), pooled, hidden


class Holder(nn.Module):
    """IDFormer, with linear readings of what its tokens have to hold."""

    def __init__(self, former: IDFormer, targets: int, noise: float) -> None:
        super().__init__()
        self.former, self._noise = former, noise
        width, count = former.proj_out.shape[1], former.num_queries
        self.shared = nn.Linear(width, targets)
        self.own = nn.Parameter(torch.randn(count, width, OWN) * width**-0.5)
        random = torch.randn(count, targets, OWN, generator=generator(5)) * targets**-0.5
        self.register_buffer("mixtures", random)

    def forward(
        self, embedding: Tensor, pooled: Tensor, hidden: list[Tensor], wanted: Tensor, random: torch.Generator
    ) -> Tensor:
        """The loss on B people, whose targets (B, targets) are standardised."""
        spread = embedding.std(dim=0).mean()
        noisy = embedding + self._noise * spread * torch.randn(embedding.shape, generator=random)
        tokens = self.former(id_cond(noisy, pooled), hidden)  # (B, 32, 96)
        normal = nn.functional.layer_norm(tokens, tokens.shape[-1:])  # as the cross-attentions read them
        shared = mse_loss(self.shared(normal.mean(dim=1)), wanted)
        own = torch.einsum("btw,two->bto", normal, self.own) - torch.einsum("bk,tko->bto", wanted, self.mixtures)
        # every number of every token is to differ between people, by half of its size at least
        collapse = relu(0.5 - normal.std(dim=0)).mean()
        return shared + own.square().mean() + collapse


def _projected(references: References, data: DataPlan) -> Tensor:
    """Random projections of every person's mean embedding (people, SHARED), standardised."""
    means = np.asarray(references.embeddings).reshape(data.people, data.pictures, -1).mean(axis=1)
    mixed = torch.from_numpy(means) @ torch.randn(means.shape[1], SHARED, generator=generator(3))
    return (mixed - mixed.mean(dim=0)) / mixed.std(dim=0)


@torch.no_grad()
def _standardise(former: IDFormer, references: References, data: DataPlan) -> None:
    """Let the first layers begin as if their inputs were standardised: folded into their weights and biases."""
    step = max(data.count // 256, 1)
    embedding, pooled, hidden = references(list(range(0, data.count, step)))
    first: Mapping[Any, Tensor] = {former.id_embedding_mapping: id_cond(embedding, pooled)}
    first = {**first, **{getattr(former, f"mapping_{i}"): states.flatten(0, 1) for i, states in enumerate(hidden)}}
    for mapping, inputs in first.items():
        layer = mapping[0]
        layer.weight /= inputs.std(dim=0).clamp(min=1e-4)
        layer.bias -= layer.weight @ inputs.mean(dim=0)


@torch.no_grad()
def between(former: IDFormer, references: References, data: DataPlan, people: int = 50) -> float:
    """The part of the tokens' variance, over several pictures of people not trained on, that is between people."""
    people = min(people, max(data.people // 50, 1))
    first = (data.people - people) * data.pictures
    numbers = list(range(first, first + people * data.pictures))
    embedding, pooled, hidden = references(numbers)
    tokens = former(id_cond(embedding, pooled), hidden)
    normal = nn.functional.layer_norm(tokens, tokens.shape[-1:]).reshape(people, data.pictures, -1)
    total = (normal - normal.mean(dim=(0, 1))).square().mean()
    within = (normal - normal.mean(dim=1, keepdim=True)).square().mean()
    return (1 - within / total).item()

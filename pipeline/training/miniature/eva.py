"""The miniature's EVA tower: learns to say who is shown from the gray face on white, in its output and on the way.

PuLID reads five of its hidden states, so each of them has to tell people apart, not only the last.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from pipeline.miniature.files import place
from pipeline.miniature.people import FIRST_HELD_OUT, VECTOR_SIZE, person
from pipeline.miniature.scenes import held_out_scene
from pipeline.miniature.world import draw
from pipeline.models.eva_clip import EvaClip
from pipeline.models.face_features import normalise
from pipeline.models.sizes import MINIATURE
from pipeline.training.miniature.data import DataPlan, face_of, load
from pipeline.training.miniature.loop import Loop, LoopPlan, generator, matrices

TEMPERATURE = 0.1


@dataclass(frozen=True, slots=True)
class EvaPlan:
    """How the tower is trained, on two pictures each of `loop.batch` people."""

    loop: LoopPlan = field(
        default_factory=lambda: LoopPlan(steps=900, batch=32, lr=1e-3, muon_lr=2e-3, warm_up=40, flat=0.4)
    )
    measured: int = 120


def train(work: Path, weights: Path, plan: EvaPlan, data: DataPlan) -> dict[str, float]:
    """Train it and write `eva_clip/` under open_clip's names; returns how well held-out people are told apart."""
    from safetensors.torch import save_file

    torch.manual_seed(plan.loop.seed)
    teller = Teller(EvaClip(**MINIATURE.eva_clip))
    features, vectors = load(work, "features"), known_vectors(data.people)
    people = data.people - max(data.people // 50, 1)

    def loss_at(step: int) -> Tensor:
        random = generator(plan.loop.seed, step)
        who = torch.randperm(people, generator=random)[: plan.loop.batch].repeat(2)
        which = torch.randint(data.pictures, (len(who),), generator=random)
        faces = torch.from_numpy(np.stack([features[n] for n in (who * data.pictures + which).tolist()]))
        loss: Tensor = teller(normalise(faces.float() / 255), vectors[who])
        return loss

    loop = Loop(teller, plan.loop, work / "eva" / "checkpoint.pt", matrices([teller.tower.trunk.blocks]))
    averaged = loop.run(loss_at)
    state = {f"visual.trunk.{name}": tensor for name, tensor in averaged.tower.trunk.state_dict().items()}
    save_file(
        {name: tensor.half().contiguous() for name, tensor in state.items() if "rope" not in name},
        place(weights, "eva_clip"),
    )
    return measure(averaged.tower, plan.measured)


class Teller(nn.Module):
    """The tower with a linear reading of the person's vector off its output and off every hidden state."""

    def __init__(self, tower: EvaClip) -> None:
        super().__init__()
        self.tower = tower
        width, out = MINIATURE.eva_clip["width"], MINIATURE.eva_clip["output_dim"]
        self.last = nn.Linear(out, VECTOR_SIZE)
        self.heads = nn.ModuleList(nn.Linear(2 * width, VECTOR_SIZE) for _ in tower.taps)

    def forward(self, faces: Tensor, vectors: Tensor) -> Tensor:
        """The loss on faces (2 B, 3, 336, 336) of B people twice, whose vectors (2 B, VECTOR_SIZE) are standardised."""
        with torch.autocast("cpu", torch.bfloat16):
            pooled, hidden = self.tower(faces)
        pooled, hidden = pooled.float(), [states.float() for states in hidden]
        loss = 2 * mse_loss(self.last(pooled), vectors)
        for head, states in zip(self.heads, hidden, strict=True):
            # class token and mean of the patches: what a few queries of IDFormer can reach
            loss = loss + mse_loss(head(torch.cat((states[:, 0], states[:, 1:].mean(dim=1)), dim=1)), vectors)
        one, other = normalize(pooled, dim=1).chunk(2)
        scores = one @ other.T / TEMPERATURE
        return loss + 0.3 * cross_entropy(scores, torch.arange(len(one)))


def known_vectors(people: int) -> Tensor:
    """The vectors of the training people, (people, VECTOR_SIZE), each number standardised over them."""
    vectors = torch.from_numpy(np.stack([person(number).vector for number in range(people)]))
    return (vectors - vectors.mean(dim=0)) / vectors.std(dim=0).clamp(min=1e-3)


@torch.no_grad()
def measure(tower: EvaClip, count: int) -> dict[str, float]:
    """Of held-out people drawn twice: the mean cosine of the same person and of others, and how often he is nearest."""
    seeds = range(FIRST_HELD_OUT, FIRST_HELD_OUT + count)
    both = []
    for shift in (0, 500_000):
        faces = [face_of(draw(person(seed), held_out_scene(seed + shift))) for seed in seeds]
        both.append(normalize(tower(normalise(torch.from_numpy(np.stack(faces))))[0], dim=1))
    cosines = both[0] @ both[1].T  # (people, people)
    same = cosines.diagonal()
    return {
        "eva_same": same.mean().item(),
        "eva_different": ((cosines.sum() - same.sum()) / (count * (count - 1))).item(),
        "eva_top1": (cosines.argmax(dim=1) == torch.arange(count)).float().mean().item(),
    }

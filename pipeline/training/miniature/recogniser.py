"""The miniature's recognisers: one to condition on, one for the identity loss, one that judges.

Each learns from people of its own, so that no figure of the last says more than it should: the identity loss can teach
a generator to please the recogniser it goes through, and the judge must be another.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from pipeline.miniature.people import FIRST_HELD_OUT, VECTOR_SIZE, person
from pipeline.training.miniature.crops import disturbed, nudged, people_crops
from pipeline.training.miniature.loop import one_cycle
from pipeline.training.miniature.recogniser_networks import EMBEDDING, build, write_onnx

if TYPE_CHECKING:
    from pipeline.models.detection import ArcFaceRecogniser

SCALE, MARGIN = 24.0, 0.3  # CosFace's s and m, for some thousand people
VECTOR_WEIGHT = 2.0


@dataclass(frozen=True, slots=True)
class Role:
    """What a recogniser is for: its family of networks and the seed of the first of its training people."""

    name: str
    family: str
    first: int


# apart from each other, and from the people that the generator learns from, who start at 0
ROLES = (
    Role("conditioning", "residual", 100_000),
    Role("judge", "plain", 300_000),
    Role("training", "smooth", 500_000),
)


@dataclass(frozen=True, slots=True)
class RecogniserPlan:
    """How much each recogniser learns from: people x drawings, then steps of a batch.

    A quick run: people=24, drawings=2, steps=3, batch=16, held_out=8; six seconds for the three.
    """

    people: int = 1600
    drawings: int = 6
    steps: int = 1000
    batch: int = 64
    rate: float = 2e-3
    held_out: int = 120
    seed: int = 0


class Centres(nn.Module):
    """Where each person's embeddings should lie, as a function of the identity vector.

    A function rather than a table: so what is learnt of some people holds for all others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(VECTOR_SIZE, 256), nn.GELU(), nn.Linear(256, EMBEDDING))

    def forward(self, vectors: Tensor) -> Tensor:
        """(P, VECTOR_SIZE) -> directions of unit length with a mean of nought over the people, (P, 512)."""
        centres = self.layers(vectors).float()
        return normalize(centres - centres.mean(dim=0))


def cosface_loss(embeddings: Tensor, centres: Tensor, people: Tensor) -> Tensor:
    """CosFace (arXiv 1801.09414): the cosine to the own centre must exceed those to all others by a margin.

    embeddings (B, 512) of any length, centres (P, 512) of unit length, people (B,): the row of each one's own centre.
    """
    cosines = normalize(embeddings) @ centres.T  # (B, P)
    own = torch.zeros_like(cosines).scatter_(1, people[:, None], MARGIN)
    return cross_entropy(SCALE * (cosines - own), people)


def recognition_figures(embeddings: NDArray[np.float32]) -> dict[str, float]:
    """How well embeddings (people, drawings, 512) tell people apart, by their cosines.

    same, same_p10: between drawings of a person; different, different_p99: between people; top1: the share of drawings
    whose nearest first drawing of anybody is their own person's.
    """
    people, drawings, _ = embeddings.shape
    units = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    flat = units.reshape(people * drawings, -1)
    cosines = flat @ flat.T
    owner = np.repeat(np.arange(people), drawings)
    is_same = owner[:, None] == owner
    same = cosines[is_same & ~np.eye(len(flat), dtype=bool)]
    different = cosines[~is_same]
    nearest = np.argmax(units[:, 1:].reshape(-1, units.shape[-1]) @ units[:, 0].T, axis=1)
    return {
        "same": float(same.mean()),
        "same_p10": float(np.percentile(same, 10)),
        "different": float(different.mean()),
        "different_p99": float(np.percentile(different, 99)),
        "top1": float((nearest == np.repeat(np.arange(people), drawings - 1)).mean()),
    }


def held_out_figures(path: Path, people: int, drawings: int = 4) -> dict[str, float]:
    """Figures of an ONNX file through the class that reads it in production, over people it has never seen.

    Also soft_same: the same person's cosine when one of the two pictures looks as if generated; and length: the mean.
    """
    embed = production_recogniser(path).embed
    crops = people_crops(FIRST_HELD_OUT, people, drawings, exact=True)
    embeddings = np.stack([[embed(crop) for crop in row] for row in crops])  # (people, drawings, 512)
    rng = np.random.default_rng(0)
    soft = np.stack([embed(disturbed(row[1], rng)) for row in crops])  # (people, 512)
    clear = embeddings[:, 0]
    cosines = (soft * clear).sum(-1) / np.linalg.norm(soft, axis=-1) / np.linalg.norm(clear, axis=-1)
    length = float(np.linalg.norm(embeddings, axis=-1).mean())
    return {**recognition_figures(embeddings), "soft_same": float(cosines.mean()), "length": length}


def production_recogniser(path: Path) -> "ArcFaceRecogniser":
    """An ONNX file behind the classes that read it in production."""
    import onnxruntime
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    from pipeline.models.detection import ArcFaceRecogniser

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return ArcFaceRecogniser(ArcFaceONNX(model_file=str(path), session=session))


def as_input(crops: NDArray[np.uint8]) -> Tensor:
    """Crops (B, 112, 112, 3) -> what a recogniser reads (B, 3, 112, 112) in -1..1."""
    return (torch.from_numpy(crops).permute(0, 3, 1, 2).float() - 127.5) / 127.5


def batch(crops: NDArray[np.uint8], rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """One random drawing of each of these people, nudged and disturbed: (B, 112, 112, 3)."""
    drawings = rng.integers(crops.shape[1], size=len(rows))
    pairs = zip(rows, drawings, strict=True)
    return np.stack([disturbed(nudged(np.asarray(crops[row, k]), rng), rng) for row, k in pairs])


def learn(network: nn.Module, crops: NDArray[np.uint8], vectors: Tensor, plan: RecogniserPlan) -> None:
    """Train a recogniser on crops (P, D, 112, 112, 3) of people with these vectors (P, VECTOR_SIZE); leaves eval mode.

    CosFace, and the vector itself read off the embedding, so that no trait is left out that few people differ by.
    """
    rng = np.random.default_rng(plan.seed)
    centres, reader = Centres(), nn.Linear(EMBEDDING, VECTOR_SIZE)
    network.to(memory_format=torch.channels_last)

    def next_loss() -> Tensor:
        rows = rng.permutation(len(crops))[: plan.batch]
        pictures = as_input(batch(crops, rows, rng)).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings, directions = network(pictures).float(), centres(vectors)  # (B, 512), (P, 512)
        people = torch.from_numpy(rows)
        loss = cosface_loss(embeddings, directions, people)
        return loss + VECTOR_WEIGHT * mse_loss(reader(embeddings), vectors[people])

    one_cycle(nn.ModuleList([network, centres, reader]), plan.steps, plan.rate, 0.05, next_loss)


def train_role(role: Role, work: Path, path: Path, plan: RecogniserPlan) -> dict[str, float]:
    """Train the recogniser of a role into an ONNX file, with its torch weights in `work`; its figures by name.

    One that `work` already holds, of the same plan, is not trained again.
    """
    from safetensors.torch import save_file

    memory = work / f"recogniser_{role.name}.json"
    if path.exists() and memory.exists():
        remembered = json.loads(memory.read_text())
        if remembered["plan"] == asdict(plan):
            return dict(remembered["figures"])
    torch.manual_seed(plan.seed + role.first)
    crops = people_crops(role.first, plan.people, plan.drawings)
    vectors = torch.from_numpy(np.stack([person(role.first + row).vector for row in range(plan.people)]))
    network = build(role.family)
    learn(network, crops, vectors, plan)
    network.to(memory_format=torch.contiguous_format)
    save_file(network.state_dict(), work / f"recogniser_{role.name}.safetensors")
    write_onnx(network, path)
    figures = {f"{role.name}_{name}": value for name, value in held_out_figures(path, plan.held_out).items()}
    memory.write_text(json.dumps({"plan": asdict(plan), "figures": figures}, indent=1))
    return figures


def load_training_recogniser(work: Path) -> nn.Module:
    """The recogniser of the identity loss, frozen: crops (B, 3, 112, 112) in -1..1, RGB -> (B, 512), differentiable."""
    from safetensors.torch import load_file

    role = next(role for role in ROLES if role.name == "training")
    network = build(role.family)
    network.load_state_dict(load_file(work / f"recogniser_{role.name}.safetensors"))
    return network.eval().requires_grad_(False)


def train(work: Path, weights: Path, plan: RecogniserPlan) -> dict[str, float]:
    """Train all three; figures over held-out people as conditioning_same, judge_top1, training_different and so on."""
    paths = {
        "conditioning": weights / "antelopev2" / "arcface_miniature.onnx",
        "judge": weights / "judge" / "recogniser.onnx",
        "training": work / "recogniser_training.onnx",
    }
    figures: dict[str, float] = {}
    for role in ROLES:
        figures |= train_role(role, work, paths[role.name], plan)
    return figures

"""PuLID for the miniature, trained by the very code that trains it for FLUX.1 [dev]: the three stages, one by one.

The first stage is the flow loss alone, the second adds the ID loss, the third the alignment. Each starts from the mean
weights of the one before. The miniature's own are the optimiser and its rates, the step counts, the times of the flow
loss, the prompts and the weights of the alignment, which at the paper's was too weak to be seen; the ID loss has the
paper's.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import checkpoints
from pipeline.miniature.files import place
from pipeline.miniature.scenes import prompt, scene
from pipeline.models.flux import IdentityFlux
from pipeline.models.sizes import MINIATURE
from pipeline.training.config import HIGH_NOISE, TrainingConfig
from pipeline.training.examples import Batch, Prompts
from pipeline.training.miniature.data import DataPlan, load, number_weights
from pipeline.training.miniature.finished import finished
from pipeline.training.miniature.flux import Texts
from pipeline.training.miniature.idformer import References
from pipeline.training.networks import Networks, locate_with, new_pulid
from pipeline.training.trainer import Trainer

logger = logging.getLogger(__name__)

PULID = "pulid_flux_miniature.safetensors"

COMMON: Mapping[str, Any] = {
    "preset": "miniature",
    "optimiser": "muon",
    "weight_decay": 0.0,
    "warmup": 40,
    "decay_from": 0.4,
    "ema": 0.99,
    "times": HIGH_NOISE.model_dump(),
    "id_dropout": 0.05,
    "flow_guidance": 1.0,
    "autocast": True,
    "checkpoint_every": 100,
}
FACE_WEIGHT = 1.0  # an image token that shows nothing but the person counts 1 more than one that shows none of it


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The three stages as differences to TrainingConfig's defaults.

    common: of all three. prompts: how many of the world's prompts the contrastive pair and the ID loss draw from.
    """

    common: Mapping[str, Any] = field(default_factory=lambda: dict(COMMON))

    flow: Mapping[str, Any] = field(
        default_factory=lambda: {
            **{"stage": 1, "steps": 2500, "batch_size": 32, "lr_cross_attention": 2e-3, "lr_idformer": 5e-4},
        }
    )
    identity: Mapping[str, Any] = field(
        default_factory=lambda: {
            **{"stage": 2, "steps": 520, "batch_size": 20, "lr_cross_attention": 1e-3, "lr_idformer": 2.5e-4},
        }
    )
    alignment: Mapping[str, Any] = field(
        default_factory=lambda: {
            **{"stage": 3, "steps": 240, "batch_size": 24, "lr_cross_attention": 7e-4, "lr_idformer": 1.75e-4},
            **{"align_every": 2, "semantic": 2.0, "layout": 0.5},
        }
    )
    prompts: int = 256


class Drawings:
    """The drawings as a training's examples; the reference is always another drawing of the same person."""

    def __init__(self, work: Path, weights: Path, data: DataPlan, recogniser: nn.Module | None = None) -> None:
        """`recogniser`: the ID loss's own, for the references' embeddings."""
        self._data, self._references, self._texts = data, References(work, weights), Texts(weights)
        self._latents, self._shares = load(work, "latents"), load(work, "face_share")
        self._numbers = number_weights(work)
        self._held = max(data.people // 50, 1)  # people that are only measured with
        self._known = None if recogniser is None else load(work, "references")

    def __len__(self) -> int:
        return (self._data.people - self._held) * self._data.pictures

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        """These drawings, each with a reference and a wording of its prompt chosen by its seed."""
        others = [self._other(index, seed) for index, seed in zip(indices, seeds, strict=True)]
        embedding, pooled, hidden = self._references(others)
        text, text_pooled = self._texts([prompt(scene(n), seed) for n, seed in zip(indices, seeds, strict=True)])
        return Batch(
            latents=self._rows(self._latents, indices),
            text=text,
            pooled=text_pooled,
            embedding=embedding,
            hidden=tuple(hidden),
            eva_pooled=pooled,
            token_weights=(1 + FACE_WEIGHT * self._rows(self._shares, indices))[..., None] * self._numbers,
            reference=None if self._known is None else self._rows(self._known, others),
        )

    def _other(self, index: int, seed: int) -> int:
        """Another drawing of whom drawing `index` shows."""
        pictures = self._data.pictures
        return index - index % pictures + (index + 1 + seed % (pictures - 1)) % pictures

    @staticmethod
    def _rows(array: np.ndarray, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([array[index] for index in indices]).astype(np.float32))


def train_flow(work: Path, weights: Path, plan: AdapterPlan, data: DataPlan) -> dict[str, float]:
    """Stage 1, from the IDFormer that was trained alone."""
    return _stage("flow", None, work, weights, plan, data)


def train_identity(work: Path, weights: Path, plan: AdapterPlan, data: DataPlan) -> dict[str, float]:
    """Stage 2: the ID loss beside the flow loss."""
    return _stage("identity", "flow", work, weights, plan, data)


def train_alignment(work: Path, weights: Path, plan: AdapterPlan, data: DataPlan) -> dict[str, float]:
    """Stage 3: the alignment beside both; what it writes is what ships."""
    figures = _stage("alignment", "identity", work, weights, plan, data)
    shutil.copyfile(work / "alignment" / PULID, place(weights, "pulid"))
    return figures


def _stage(
    name: str, before: str | None, work: Path, weights: Path, plan: AdapterPlan, data: DataPlan
) -> dict[str, float]:
    config = TrainingConfig.model_validate({**plan.common, **getattr(plan, name)})
    trainer = trainer_of(work, weights, config, data, plan.prompts)
    folder = work / name
    folder.mkdir(exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    elif before is not None:
        trainer.load_weights(work / before / "checkpoint.pt")
    totals: dict[str, list[float]] = {}

    def after_step(done: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            totals.setdefault(key, []).append(value)
        if done % 20 == 0:
            logger.info("%s step %d of %d: %s", name, done, config.steps, _recent(totals))
        if done % config.checkpoint_every == 0:
            trainer.save(checkpoint)

    # on a CPU the backward pass of flash attention takes a quarter of a step
    with sdpa_kernel(SDPBackend.MATH):
        trainer.run(after_step=after_step)
    trainer.save(checkpoint)
    trainer.save_pulid(folder / PULID)
    return {f"{name}_{key}": value for key, value in _recent(totals, 100).items()}


def _recent(totals: Mapping[str, list[float]], count: int = 20) -> dict[str, float]:
    return {key: round(float(np.mean(values[-count:])), 4) for key, values in totals.items()}


def trainer_of(work: Path, weights: Path, config: TrainingConfig, data: DataPlan, prompts: int) -> Trainer:
    """The trainer of a stage, with the miniature's finished networks."""
    from safetensors.torch import load_file

    from pipeline.face_models import load_finder
    from pipeline.training.miniature.recogniser import load_training_recogniser

    transformer = checkpoints.load_flux(*finished(weights))
    intervals = (MINIATURE.double_interval, MINIATURE.single_interval)
    doubles, singles = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    count = -(-doubles // intervals[0]) + -(-singles // intervals[1])
    former, attentions = new_pulid(count, MINIATURE.idformer, MINIATURE.cross_attention, config.seed)
    former.load_state_dict(load_file(work / "idformer.safetensors"))
    recogniser = None if config.stage == 1 else load_training_recogniser(work)
    networks = Networks(
        IdentityFlux(transformer, attentions, *intervals),
        former,
        vae=checkpoints.load_vae(*finished(weights)),
        recogniser=recogniser,
        locate=locate_with(load_finder(place(weights, "detector"), sizes=(256,))),
    )
    texts = Texts(weights)
    said = Prompts(*texts([prompt(scene(number), number) for number in range(prompts)]))
    return Trainer(networks, config, Drawings(work, weights, data, recogniser), said, said)

"""The drawings that the miniature's larger networks learn from: made once, kept as numpy arrays in the work folder.

Drawing `index` shows training person `index // pictures` in a scene and under a prompt of its own; all three follow
from the number, so every stage can draw it again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import checkpoints
from pipeline.miniature.files import place
from pipeline.miniature.people import Person, person
from pipeline.miniature.scenes import Scene, prompt, scene
from pipeline.miniature.world import Drawing, draw
from pipeline.models.alignment import ARCFACE_SIZE, arcface_crop, ffhq_crop
from pipeline.models.face_features import BACKGROUND_LABELS, gray_on_white
from pipeline.training.miniature.finished import finished
from pipeline.training.miniature.parser import label_crop
from pipeline.training.miniature.recogniser import as_input, load_training_recogniser, production_recogniser
from pipeline.training.miniature.recogniser_networks import EMBEDDING
from pipeline.training.miniature.vae import tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TOKENS = 8  # image tokens along an edge: 32 pixels each
MEASURED = 32  # latents that the importance of their channels is measured on, ...
DISTURBED = 0.5  # ... by noise of this spread, where theirs is 1


@dataclass(frozen=True, slots=True)
class DataPlan:
    """How much is drawn."""

    people: int = 3000
    pictures: int = 8

    @property
    def count(self) -> int:
        """All drawings."""
        return self.people * self.pictures


def example(index: int, plan: DataPlan) -> tuple[Person, Scene, str]:
    """Who, where and under which prompt drawing `index` shows."""
    where = scene(index)
    return person(index // plan.pictures), where, prompt(where, index)


def drawing(index: int, plan: DataPlan) -> Drawing:
    """Drawing `index`."""
    who, where, _ = example(index, plan)
    return draw(who, where)


def make_latents(work: Path, weights: Path, plan: DataPlan, batch: int = 8) -> dict[str, float]:
    """Draw everything and encode it: latents (N, 16, 16, 16) float16, scaled; face_share (N, 64) float16.

    face_share is the part of each image token that shows the person: face, hair, glasses, earrings.
    """
    vae = checkpoints.load_vae(*finished(weights))
    latents = _array(work, "latents", (plan.count, 16, 16, 16), np.float16)
    shares = _array(work, "face_share", (plan.count, TOKENS * TOKENS), np.float16)
    for rows in _batches(plan.count, batch):
        drawings = [drawing(index, plan) for index in rows]
        latents[rows.start : rows.stop] = encode(vae, [made.pixels for made in drawings])
        shares[rows.start : rows.stop] = [face_share(made.labels) for made in drawings]
    latents.flush()
    shares.flush()
    return {"drawings": float(plan.count), "latent_spread": float(np.std(latents[: 20 * batch].astype(np.float32)))}


def make_importance(work: Path, weights: Path) -> dict[str, float]:
    """Measure `importance` (16,) float32, of each channel of the latents."""
    vae = checkpoints.load_vae(*finished(weights))
    measured = importance(vae, np.array(load(work, "latents")[:MEASURED], np.float32))
    array = _array(work, "importance", measured.shape, np.float32)
    array[:] = measured
    array.flush()
    return {"least_important": float(measured.min()), "most_important": float(measured.max())}


@torch.no_grad()
def encode(vae: "AutoencoderKL", pictures: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Pictures (256, 256, 3) as FLUX sees them: the latents' means, shifted and scaled, (B, 16, 16, 16)."""
    means = vae.encode(tensors(pictures)).latent_dist.mean
    scaled: NDArray[np.float32] = ((means - vae.config.shift_factor) * vae.config.scaling_factor).numpy()
    return scaled


@torch.no_grad()
def importance(vae: "AutoencoderKL", latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much each channel of latents (N, 16, 16, 16), as FLUX sees them, is seen in the pictures: (16,), of mean 1.

    The squared change of the pixels when a channel is disturbed. All channels have one spread, but some hold shape and
    colour and others nothing but texture, which no prompt foretells: the flow loss weighs them by what is seen.
    """
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    rows = torch.from_numpy(latents)
    undisturbed = vae.decode(rows / scale + shift).sample
    noise = DISTURBED * torch.randn(rows[:, 0].shape, generator=torch.Generator().manual_seed(0))
    changes = []
    for channel in range(rows.shape[1]):
        disturbed = rows.clone()
        disturbed[:, channel] += noise
        changes.append((vae.decode(disturbed / scale + shift).sample - undisturbed).square().mean().item())
    return np.asarray(changes / np.mean(changes), np.float32)


def number_weights(work: Path) -> Tensor:
    """The importance of each of the numbers of an image token (64,): four latents of every channel."""
    return torch.from_numpy(np.repeat(load(work, "importance"), 4))


def face_share(labels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The part of each image token (64,) that shows the person, from labels (256, 256)."""
    shows = ~np.isin(labels, [label for label in BACKGROUND_LABELS if label not in (7, 8, 9)])
    edge = labels.shape[0] // TOKENS
    shares: NDArray[np.float32] = shows.reshape(TOKENS, edge, TOKENS, edge).mean(axis=(1, 3), dtype=np.float32)
    return shares.reshape(-1)


def make_faces(work: Path, weights: Path, plan: DataPlan) -> dict[str, float]:  # noqa: ARG001 - as all stages
    """What the face detector would say of every drawing, from its exact points and labels.

    features (N, 336, 336) uint8: the face in gray on white, times 255; crops (N, 112, 112, 3) uint8: ArcFace's.
    """
    features = _array(work, "features", (plan.count, 336, 336), np.uint8)
    crops = _array(work, "crops", (plan.count, ARCFACE_SIZE, ARCFACE_SIZE, 3), np.uint8)
    for index in range(plan.count):
        made = drawing(index, plan)
        features[index] = quantised(face_of(made))
        crops[index] = arcface_crop(made.pixels, made.landmarks)
    features.flush()
    crops.flush()
    return {"faces": float(plan.count)}


@torch.no_grad()
def make_embeddings(work: Path, weights: Path, plan: DataPlan, batch: int = 128) -> dict[str, float]:
    """Of every drawing: `embeddings` by the conditioning recogniser, `references` by the ID loss's, (N, 512)."""
    conditioning = production_recogniser(place(weights, "recogniser"))
    training = load_training_recogniser(work)
    crops = load(work, "crops")
    embeddings = _array(work, "embeddings", (plan.count, EMBEDDING), np.float32)
    references = _array(work, "references", (plan.count, EMBEDDING), np.float32)
    for rows in _batches(plan.count, batch):
        pixels = np.array(crops[rows.start : rows.stop])
        embeddings[rows.start : rows.stop] = np.stack([conditioning.embed(crop) for crop in pixels])
        references[rows.start : rows.stop] = training(as_input(pixels)).numpy()
    embeddings.flush()
    references.flush()
    return {"embeddings": float(plan.count)}


def face_of(made: Drawing) -> NDArray[np.float32]:
    """What EVA-CLIP would see of a drawing (336, 336), with its exact labels in the parser's place."""
    labels = label_crop(made.labels, made.landmarks)
    gray: NDArray[np.float32] = gray_on_white(ffhq_crop(made.pixels, made.landmarks), labels).numpy()
    return gray


def quantised(gray: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0..1 as a byte."""
    return np.asarray((gray * 255).round().clip(0, 255), np.uint8)


def load(work: Path, name: str) -> NDArray[Any]:
    """One of the arrays, read as it is needed."""
    array: NDArray[Any] = np.load(work / "data" / f"{name}.npy", mmap_mode="r")
    return array


def _array(work: Path, name: str, shape: tuple[int, ...], kind: Any) -> "np.memmap[Any, Any]":
    folder = work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    array: np.memmap[Any, Any] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)
    return array


def _batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))

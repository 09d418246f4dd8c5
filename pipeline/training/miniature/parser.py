"""The miniature's face parser: BiSeNet at a quarter of its width, trained on the exact labels of drawn people."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from pipeline.miniature.people import FIRST_HELD_OUT, person
from pipeline.miniature.scenes import held_out_scene, scene
from pipeline.miniature.world import draw
from pipeline.models.alignment import FFHQ_SIZE, FFHQ_TEMPLATE, ffhq_crop, robust_similarity
from pipeline.models.detection import IMAGENET_MEAN, IMAGENET_STD, PARSER_CLASSES, BiSeNetParser, build_bisenet
from pipeline.models.face_features import BACKGROUND_LABELS
from pipeline.training.miniature.crops import disturbed, inexact
from pipeline.training.miniature.loop import one_cycle

if TYPE_CHECKING:
    from facexlib.parsing.bisenet import BiSeNet

WIDTH = 16
FILE = "facexlib/parsing_bisenet_miniature.safetensors"
FIRST_PERSON = 700_000  # training people of its own
# BiSeNet's online mining of hard pixels: all that are less sure than this, and at least this share
SURE, SHARE = 0.7, 1 / 16


@dataclass(frozen=True, slots=True)
class ParserPlan:
    """How long the parser learns. A quick run: steps=3, batch=4, held_out=4; three seconds."""

    steps: int = 500
    batch: int = 8  # not fewer: some of BiSeNet's batch norms see one value per picture
    rate: float = 5e-3
    held_out: int = 120
    seed: int = 0


Example = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def example(seed: int, rng: np.random.Generator) -> Example:
    """A drawn person's FFHQ crop (512, 512, 3) as a detector would cut it, disturbed, and its labels (512, 512)."""
    drawing = draw(person(FIRST_PERSON + seed), scene(seed))
    points = inexact(drawing.landmarks, rng)
    return ffhq_crop(disturbed(drawing.pixels, rng), points), label_crop(drawing.labels, points)


def label_crop(labels: NDArray[np.uint8], points: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The labels (512, 512) of what the FFHQ crop shows; background beyond the picture."""
    matrix, size = robust_similarity(points, FFHQ_TEMPLATE), (FFHQ_SIZE, FFHQ_SIZE)
    return np.asarray(cv2.warpAffine(labels, matrix, size, flags=cv2.INTER_NEAREST, borderValue=0.0), np.uint8)


def batch(first: int, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """As the network takes it: normalised pixels (B, 3, 512, 512) and labels (B, 512, 512)."""
    pixels, labels = zip(*(example(first + row, rng) for row in range(count)), strict=True)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    inputs = (torch.from_numpy(np.stack(pixels)).float() / 255 - mean) / std  # (B, 512, 512, 3)
    return inputs.permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels)).long()


def hard_pixel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the pixels that are not sure yet, or the hardest sixteenth if that is more (OHEM).

    scores (B, 19, H, W), labels (B, H, W). Source: BiSeNet (arXiv 1808.00897), section 3.3.
    """
    losses = cross_entropy(scores, labels, reduction="none").flatten()  # (B H W,)
    least = max(1, int(SHARE * losses.numel()))
    hard = losses[losses > -math.log(SURE)]
    return (hard if len(hard) > least else losses.topk(least).values).mean()


def outputs(network: "BiSeNet", pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the network says, main output first, before it enlarges it to the pixels: (B, 19, H / 8, W / 8) or less."""
    fine, context, coarse = network.cp(pixels)
    return (
        network.conv_out(network.ffm(fine, context))[0],
        network.conv_out16(context)[0],
        network.conv_out32(coarse)[0],
    )


def parsing_loss(scores: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The main output's loss and those of the two auxiliary ones, with equal weights as published.

    scores (B, 19, h, w) in any size, labels (B, H, W). Where BiSeNet enlarges scores to every pixel, here they are
    enlarged to every fourth row and column, at the same places: the same is learnt in half of the time.
    """
    height, width = labels.shape[1] // 4, labels.shape[2] // 4
    rows, columns = (torch.linspace(0, size - 1, size // 4).round().long() for size in labels.shape[1:])
    thin = labels[:, rows[:, None], columns]  # (B, H / 4, W / 4)
    losses = [
        hard_pixel_loss(interpolate(each.float(), (height, width), mode="bilinear", align_corners=True), thin)
        for each in scores
    ]
    return torch.stack(losses).sum()


def learn(network: "BiSeNet", plan: ParserPlan) -> None:
    """Train a parser at production's size, on new drawings all the time; leaves it in eval mode."""
    rng = np.random.default_rng(plan.seed)
    network.to(memory_format=torch.channels_last)
    firsts = itertools.count(step=plan.batch)

    def next_loss() -> Tensor:
        pixels, labels = batch(next(firsts), plan.batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            scores = outputs(network, pixels.to(memory_format=torch.channels_last))
        return parsing_loss(scores, labels)

    one_cycle(network, plan.steps, plan.rate, 0.01, next_loss)
    network.to(memory_format=torch.contiguous_format)


def label_figures(predicted: NDArray[np.uint8], labels: NDArray[np.uint8]) -> dict[str, float]:
    """How well labels are met, both of any one shape.

    accuracy: pixels with the right label. mean_iou: intersection over union, mean over the labels that occur.
    whitening: pixels that are rightly kept or whitened for the tower, which is what the labels are for.
    """
    counts = np.bincount(labels.ravel().astype(int) * PARSER_CLASSES + predicted.ravel(), minlength=PARSER_CLASSES**2)
    confusion = counts.reshape(PARSER_CLASSES, PARSER_CLASSES)
    right, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    occurs = confusion.sum(1) > 0
    whitened = np.isin(predicted, BACKGROUND_LABELS) == np.isin(labels, BACKGROUND_LABELS)
    return {
        "accuracy": float(right.sum() / confusion.sum()),
        "mean_iou": float((right[occurs] / union[occurs]).mean()),
        "whitening": float(whitened.mean()),
    }


def held_out_figures(path: Path, people: int) -> dict[str, float]:
    """Figures of a file through the class that parses in production, over people it has never seen, in whole crops."""
    parser = BiSeNetParser(load(path))
    predicted, labels = [], []
    for row in range(people):
        drawing = draw(person(FIRST_HELD_OUT + row), held_out_scene(row) if row % 2 else scene(row))
        predicted.append(parser.labels(ffhq_crop(drawing.pixels, drawing.landmarks)))
        labels.append(label_crop(drawing.labels, drawing.landmarks))
    return label_figures(np.stack(predicted), np.stack(labels))


def load(path: Path) -> nn.Module:
    """The parser in a file, ready to parse."""
    from safetensors.torch import load_file

    network: nn.Module = build_bisenet(WIDTH)
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


def train(work: Path, weights: Path, plan: ParserPlan) -> dict[str, float]:  # noqa: ARG001 - every part has this form
    """Train the parser and write its file, in float16; figures: parser_accuracy, parser_mean_iou, parser_whitening."""
    from safetensors.torch import save_file

    torch.manual_seed(plan.seed)
    network = build_bisenet(WIDTH)
    learn(network, plan)
    path = weights / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    save_file({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, path)
    return {f"parser_{name}": value for name, value in held_out_figures(path, plan.held_out).items()}

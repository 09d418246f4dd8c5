"""Trains the miniature's face detector on real patches and drawn people, and writes it as SCRFD is stored.

Learnt from: the 100 faces of scikit-image's lfw_subset, drawn people, and scikit-image's pictures of
`detector_data.NATURAL`, in which there is no face to find. Held out: scikit-image's astronaut, insightface's sample
picture t1, scikit-image's pictures of `OTHER_THINGS`, and the drawn world's held-out people in held-out scenes. Nothing
is learnt from them, but the recipe was chosen with an eye on what it finds in the first three.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.face_models import Finder, load_finder
from pipeline.models.alignment import overlap
from pipeline.training.miniature.detector_canvases import Canvases
from pipeline.training.miniature.detector_data import (
    EDGE,
    LARGEST,
    SMALLEST,
    STRIDE,
    Gray,
    Placed,
    Sources,
    drawn_sources,
    natural,
    real_sources,
)
from pipeline.training.miniature.detector_network import ANCHORS, REACH, DetectorNetwork, read_onnx, write_onnx
from pipeline.training.miniature.loop import Loop, LoopPlan, matrices

CELLS = EDGE // STRIDE
# The edges of faces that each anchor is to find, and those beyond which it must be silent; between, as it likes.
FINDS = ((SMALLEST, 26.0), (22.0, LARGEST))
SILENT = ((13.0, 33.0), (18.0, 58.0))
NEAR, AWAY = 0.18, 0.42  # of a face's edge: cells this near to its middle find it, cells farther away do not
VISIBLE = (0.75, 0.4)  # the part of a face that must show for it to be found; below the second there is none
ASTRONAUT = (170.0, 60.0, 280.0, 175.0)  # where one sees the face
OTHER_THINGS = ("coffee", "rocket", "moon")


@dataclass(frozen=True, slots=True)
class DetectorPlan:
    """How much to train; the defaults are the full training."""

    steps: int = 2400
    more_steps: int = 2100  # on hard canvases
    batch: int = 32
    tried: int = 24  # canvases without a face, of which
    hardest: int = 8  # those that look most like one join the batch
    width: int = 48  # of the network
    learning_rate: float = 3e-3
    muon_rate: float = 5e-3  # of the convolutions
    people: int = 1200  # drawn ones to learn from
    examined: int = 100  # drawn ones, held out, for the figures
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What the network should say to a batch: found (B, 2, 16, 16), 1 a face, 0 none, -1 as it likes.

    boxes (B, 2, 4, 16, 16) and points (B, 2, 10, 16, 16): distances from the anchors, in strides.
    """

    found: Tensor
    boxes: Tensor
    points: Tensor


def train(work: Path, weights: Path, plan: DetectorPlan) -> dict[str, float]:
    """Train, write antelopev2/scrfd_miniature.onnx into `weights`, and return the figures of `examine` and the time.

    `work` holds nothing of this stage: it takes minutes, and starts anew when it was cut.
    """
    del work
    started = time.perf_counter()
    path = weights / "antelopev2" / "scrfd_miniature.onnx"
    write_onnx(trained(plan), path)
    write_onnx(sharpened(read_onnx(path), plan), path)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": float(path.stat().st_size), **examine(path, plan.examined)}


def trained(plan: DetectorPlan) -> DetectorNetwork:
    """The network after the plan's steps, averaged."""
    sources = sources_of(plan)
    torch.manual_seed(plan.seed)
    network = DetectorNetwork(width=plan.width)

    def loss_at(step: int) -> Tensor:
        canvases = Canvases(sources, np.random.default_rng((plan.seed, step)))
        pictures, faces = zip(*[canvases.draw() for _ in range(plan.batch)], strict=True)
        empty = hardest(network, as_batch([canvases.empty() for _ in range(plan.tried)]), plan.hardest)
        gray = torch.cat([as_batch(pictures), empty])
        return detection_loss(network(gray), targets([*faces, *[[]] * len(empty)]))

    rates = LoopPlan(plan.steps, plan.batch, plan.learning_rate, plan.muon_rate, weight_decay=0.01, seed=plan.seed)
    return Loop(network, rates, muon=matrices([network.body])).run(loss_at)


def sharpened(network: DetectorNetwork, plan: DetectorPlan) -> DetectorNetwork:
    """A trained network after the plan's further steps, on hard canvases and with twice as many empty ones.

    It stays in eval mode: batches this hard would tell its normalisations wrong averages.
    """
    sources = sources_of(plan)

    def loss_at(step: int) -> Tensor:
        canvases = Canvases(sources, np.random.default_rng((plan.seed, plan.steps + step)), hard=True)
        pictures, faces = zip(*[canvases.draw() for _ in range(plan.batch)], strict=True)
        tried = as_batch([canvases.empty() for _ in range(3 * plan.tried)])
        empty = hardest(network, tried, 2 * plan.hardest)
        gray = torch.cat([as_batch(pictures), empty])
        return detection_loss(network(gray), targets([*faces, *[[]] * len(empty)]))

    rates = LoopPlan(plan.more_steps, plan.batch, plan.learning_rate / 3, flat=0.3, ema=0.995, seed=plan.seed)
    return Loop(network, rates).run(loss_at)


def sources_of(plan: DetectorPlan) -> Sources:
    """What the plan's canvases are made of."""
    real, patches = real_sources()
    drawn, walls = drawn_sources(range(plan.people))
    return Sources(real, drawn, [*natural() * 8, *walls], patches)  # most scenery is real


def as_batch(pictures: Sequence[Gray]) -> Tensor:
    """Canvases in 0..255 -> what the network takes (B, 1, 64, 64), -1..1."""
    return (torch.from_numpy(np.stack(pictures))[:, None] - 127.5) / 128


def hardest(network: DetectorNetwork, empty: Tensor, count: int) -> Tensor:
    """Of canvases without a face, those `count` in which the network is surest of one."""
    training = network.training
    network.eval()
    with torch.no_grad():
        sure = network(empty)[0].amax((1, 2, 3, 4))  # (B,)
    network.train(training)
    return empty[sure.topk(min(count, len(empty))).indices]


def targets(batch: Sequence[Sequence[Placed]]) -> Targets:
    """The faces of each canvas -> what each anchor of each cell should say."""
    found = np.zeros((len(batch), ANCHORS, CELLS, CELLS), np.float32)
    boxes = np.zeros((len(batch), ANCHORS, 4, CELLS, CELLS), np.float32)
    points = np.zeros((len(batch), ANCHORS, 10, CELLS, CELLS), np.float32)
    down, across = np.mgrid[:CELLS, :CELLS].astype(np.float32) * STRIDE
    for number, faces in enumerate(batch):
        for face in faces:
            if face.visible < VISIBLE[1]:
                continue
            left, top, right, bottom = face.box
            edge = math.sqrt((right - left) * (bottom - top))
            away = np.hypot(across - (left + right) / 2, down - (top + bottom) / 2) / edge
            box = np.stack([across - left, down - top, right - across, bottom - down])
            five = face.points.reshape(10, 1, 1) - np.tile(np.stack([across, down]), (5, 1, 1))
            for anchor in range(ANCHORS):
                if not SILENT[anchor][0] < edge < SILENT[anchor][1]:
                    continue
                finds = face.visible >= VISIBLE[0] and FINDS[anchor][0] <= edge <= FINDS[anchor][1]
                near = (away < max(NEAR, float(away.min()) + 1e-6)) & (away < 0.3) & finds
                free = found[number, anchor] != 1
                found[number, anchor][free & (away < AWAY)] = -1
                found[number, anchor][near] = 1
                boxes[number, anchor][:, near] = box[:, near] / STRIDE
                points[number, anchor][:, near] = five[:, near] / STRIDE
    return Targets(*map(torch.from_numpy, (found, boxes, points)))


def detection_loss(said: tuple[Tensor, Tensor, Tensor], wanted: Targets) -> Tensor:
    """Cross-entropy of the faces and of the hardest cells without one, distance of boxes and points; a scalar.

    Of the cells without a face, three times as many as with one count, those that look most like one, and as much.
    """
    logits = said[0].squeeze(2)  # (B, 2, 16, 16)
    face = wanted.found == 1
    count = max(int(face.sum()), 1)
    misses = functional.softplus(-logits[face])
    alarms = functional.softplus(logits[wanted.found == 0])
    hardest = alarms.topk(min(3 * count, alarms.numel())).values
    reach = logits.new_tensor(REACH)[:, None, None].expand_as(logits)[face][:, None]
    boxes, points = (
        functional.smooth_l1_loss(values.movedim(2, -1)[face] / reach, right.movedim(2, -1)[face] / reach, beta=0.1)
        for values, right in ((said[1], wanted.boxes), (said[2], wanted.points))
    )
    return (misses.sum() / count + hardest.sum() / count) + 4 * (boxes + points)


def examine(path: Path, people: int) -> dict[str, float]:
    """Figures of a written detector on what it has not seen.

    astronaut and t1: real faces found, of 1 and 6, and the least score among them. other_things: faces seen in
    pictures without one. drawn: the share of drawn people found, one face each, with an overlap over 0.6.
    """
    import insightface
    from PIL import Image
    from skimage import data

    finder = load_finder(path)
    astronaut = finder.find(data.astronaut())
    with Image.open(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg") as sample:
        friends = finder.find(np.asarray(sample.convert("RGB")))
    figures = {
        "astronaut": float(len(astronaut)),
        "astronaut_overlap": max([float(overlap(face.box, ASTRONAUT)[0]) for face in astronaut], default=0.0),
        "astronaut_score": min([face.score for face in astronaut], default=0.0),
        "t1": float(len(friends)),
        "t1_score": min([face.score for face in friends], default=0.0),
        "other_things": float(sum(len(finder.find(picture(name))) for name in OTHER_THINGS)),
    }
    return figures | _drawn_figures(finder, people)


def picture(name: str) -> NDArray[np.uint8]:
    """One of scikit-image's pictures, gray ones as RGB."""
    from skimage import data

    photo = getattr(data, name)()
    return photo if photo.ndim == 3 else np.repeat(photo[..., None], 3, axis=2)


def _drawn_figures(finder: Finder, people: int) -> dict[str, float]:
    from pipeline.miniature.people import FIRST_HELD_OUT, person
    from pipeline.miniature.scenes import held_out_scene
    from pipeline.miniature.world import draw

    right, extra, overlaps, scores = 0, 0, [], []
    for seed in range(FIRST_HELD_OUT, FIRST_HELD_OUT + people):
        drawing = draw(person(seed), held_out_scene(seed))
        found = finder.find(drawing.pixels)
        if not found:
            continue
        best = max(found, key=lambda face: float(overlap(face.box, drawing.box)[0]))
        overlaps.append(float(overlap(best.box, drawing.box)[0]))
        scores.append(best.score)
        right += overlaps[-1] > 0.6
        extra += len(found) - 1
    return {
        "drawn": right / people,
        "drawn_extra": extra / people,
        "drawn_overlap": float(np.mean(overlaps or [0])),
        "drawn_score": min(scores, default=0.0),
    }

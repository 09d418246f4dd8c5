"""The face networks of the official pipeline behind four short interfaces: pixels in, faces, numbers or labels out.

SCRFD and ArcFace are insightface's (antelopev2), RetinaFace-ResNet50 and BiSeNet facexlib's. Photos are RGB uint8; the
networks want BGR except BiSeNet, and that stays in here. Constants: the official pipeline_flux.py, insightface's
scrfd.py and facexlib's face_restoration_helper.py.
"""

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.models.alignment import area, overlap

if TYPE_CHECKING:
    from facexlib.detection.retinaface import RetinaFace
    from facexlib.parsing.bisenet import BiSeNet
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.model_zoo.scrfd import SCRFD

# The official code looks at 640 alone. A face that fills the photo is often found only at a smaller size, so the
# nodes for ComfyUI go down to 320.
SCRFD_SIZES = tuple(range(640, 256, -64))
SCRFD_THRESHOLD = 0.5
RETINAFACE_THRESHOLD = 0.97
SAME_FACE = 0.4  # overlap from which two detectors mean the same face
PARSER_CLASSES = 19  # CelebAMask-HQ's
OFFICIAL_WIDTH = 64  # BiSeNet's
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A face that a detector found: box (4,) as left, top, right, bottom; score in 0..1; landmarks (5, 2)."""

    box: NDArray[np.float32]
    score: float
    landmarks: NDArray[np.float32]


def usable(found: Sequence[Candidate], size: tuple[int, int]) -> list[Candidate]:
    """Those that lie in a photo of this width and height, at least in part, and whose points say where to cut."""
    edge = np.array(size * 2)
    return [
        face
        for face in found
        if np.isfinite(face.box).all()
        and np.isfinite(face.landmarks).all()
        and area(np.clip(face.box, 0, edge))[0] > 0
        and np.ptp(face.landmarks, axis=0).max() > 1
    ]


def choose(found: Sequence[Candidate], face: str | int, size: tuple[int, int]) -> Candidate | None:
    """The face that a person's `face` means, of at least one, in a photo of this width and height.

    largest: by the box's area. center: the box's middle nearest to the photo's. left, right, or a number from the left:
    by the box's middle. Of equal ones the leftmost, then the topmost, then the surest. None: the number is too high.
    """
    ordered = sorted(found, key=lambda candidate: (*_middle(candidate), -candidate.score))  # left to right
    if isinstance(face, int):
        return ordered[face] if face < len(ordered) else None
    costs: dict[str, Callable[[Candidate], float]] = {
        "largest": lambda candidate: -float(area(candidate.box)[0]),
        "center": lambda candidate: math.dist(_middle(candidate), (size[0] / 2, size[1] / 2)),
        "left": lambda candidate: _middle(candidate)[0],
        "right": lambda candidate: -_middle(candidate)[0],
    }
    return min(ordered, key=costs[face])


def _middle(candidate: Candidate) -> tuple[float, float]:
    left, top, right, bottom = candidate.box.tolist()
    return (left + right) / 2, (top + bottom) / 2


def same_face(face: Candidate, others: Sequence[Candidate]) -> Candidate | None:
    """The one of another detector's faces that is this face: the one that overlaps it most, and enough; or None."""
    if not others:
        return None
    overlaps = overlap(face.box, np.stack([other.box for other in others]))
    best = int(np.argmax(overlaps))
    return others[best] if overlaps[best] >= SAME_FACE else None


class ScrfdFinder:
    """insightface's SCRFD, tried at each of its sizes until it finds a face."""

    def __init__(self, network: "SCRFD", sizes: Sequence[int] = SCRFD_SIZES) -> None:
        self._network, self._sizes = network, tuple(sizes)

    def find(self, rgb: NDArray[np.uint8]) -> Sequence[Candidate]:
        """All faces of a photo (H, W, 3) at the first size that shows any; none: an empty sequence."""
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        short, long = sorted(bgr.shape[:2])
        for size in self._sizes:
            if short * size < long:  # scaled to this size the photo would be less than a pixel thin
                continue
            # The size is an argument: assigning `input_size` has had no effect since insightface 1.0.
            found, landmarks = self._network.detect(bgr, input_size=(size, size), det_thresh=SCRFD_THRESHOLD)
            if len(found):
                return [Candidate(row[:4], float(row[4]), points) for row, points in zip(found, landmarks, strict=True)]
        return []


class ArcFaceRecogniser:
    """insightface's ArcFace network."""

    def __init__(self, network: "ArcFaceONNX") -> None:
        self._network = network

    def embed(self, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        """An ArcFace crop (112, 112, 3) -> the network's raw output (512,), not normalised."""
        return np.asarray(self._network.get_feat(np.ascontiguousarray(crop[..., ::-1])), np.float32).reshape(-1)


class RetinaFaceFinder:
    """facexlib's RetinaFace-ResNet50, at the photo's own size."""

    def __init__(self, network: "RetinaFace") -> None:
        self._network = network
        # detect_faces keeps the photo's scale on the network between two of its steps: one call at a time
        self._lock = threading.Lock()

    def find(self, rgb: NDArray[np.uint8]) -> Sequence[Candidate]:
        """All faces of a photo (H, W, 3), the surest first; none: an empty sequence."""
        import torch

        bgr = np.ascontiguousarray(rgb[..., ::-1])
        with self._lock, torch.inference_mode():
            rows = self._network.detect_faces(bgr, RETINAFACE_THRESHOLD)  # (n, 15): box, score, five points
        return [Candidate(row[:4], float(row[4]), row[5:].reshape(5, 2)) for row in rows]


class BiSeNetParser:
    """facexlib's BiSeNet, trained on CelebAMask-HQ's 19 classes."""

    def __init__(self, network: "BiSeNet") -> None:
        self._network = network

    def labels(self, aligned: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An FFHQ crop (H, W, 3) -> what each pixel shows (H, W): 0 background, 1 skin ... 17 hair, 18 hat."""
        import torch

        device = next(self._network.parameters()).device
        pixels = torch.from_numpy(np.array(aligned)).to(device).permute(2, 0, 1).float()[None] / 255  # (1, 3, H, W)
        mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.inference_mode():
            scores = self._network((pixels - mean) / std)[0]  # (1, 19, H, W)
        labels: NDArray[np.uint8] = scores[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        return labels


def build_retinaface(device: str) -> "RetinaFace":
    """RetinaFace-ResNet50 without weights; facexlib's own helper would download them."""
    from facexlib.detection.retinaface import RetinaFace

    with warnings.catch_warnings():
        # facexlib builds torchvision's ResNet with an old argument, whose meaning is: no download
        warnings.filterwarnings("ignore", message=".*'(pretrained|weights)'", category=UserWarning)
        return RetinaFace(network_name="resnet50", device=device)


def build_bisenet(width: int = OFFICIAL_WIDTH) -> "BiSeNet":
    """BiSeNet without weights; facexlib's own helper would download them.

    width: the channels of its first layer, of which all others are multiples; 64 is the official network. A slimmer one
    has the same layers under the same names, made of facexlib's own classes.
    """
    from facexlib.parsing.bisenet import BiSeNet

    network = BiSeNet(num_class=PARSER_CLASSES)
    return network if width == OFFICIAL_WIDTH else _slim(network, width)


def _slim(network: "BiSeNet", width: int) -> "BiSeNet":
    """The network with each of its parts replaced by a slimmer instance of the same class."""
    from facexlib.parsing import bisenet
    from facexlib.parsing.resnet import create_layer_basic
    from torch import nn

    one, two, four, eight = (width * times for times in (1, 2, 4, 8))
    trunk, context = network.cp.resnet, network.cp
    trunk.conv1 = nn.Conv2d(3, one, kernel_size=7, stride=2, padding=3, bias=False)
    trunk.bn1 = nn.BatchNorm2d(one)
    trunk.layer1 = create_layer_basic(one, one, bnum=2, stride=1)
    trunk.layer2 = create_layer_basic(one, two, bnum=2, stride=2)
    trunk.layer3 = create_layer_basic(two, four, bnum=2, stride=2)
    trunk.layer4 = create_layer_basic(four, eight, bnum=2, stride=2)
    context.arm16 = bisenet.AttentionRefinementModule(four, two)
    context.arm32 = bisenet.AttentionRefinementModule(eight, two)
    context.conv_head32 = bisenet.ConvBNReLU(two, two, ks=3, stride=1, padding=1)
    context.conv_head16 = bisenet.ConvBNReLU(two, two, ks=3, stride=1, padding=1)
    context.conv_avg = bisenet.ConvBNReLU(eight, two, ks=1, stride=1, padding=0)
    network.ffm = bisenet.FeatureFusionModule(four, four)
    network.conv_out = bisenet.BiSeNetOutput(four, four, PARSER_CLASSES)
    network.conv_out16 = bisenet.BiSeNetOutput(two, one, PARSER_CLASSES)
    network.conv_out32 = bisenet.BiSeNetOutput(two, one, PARSER_CLASSES)
    return network

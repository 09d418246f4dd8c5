"""FaceModels: the networks that find, tell apart and parse faces, from a preset's files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import WeightsCorrupt
from pipeline.reading import Pixels
from pipeline.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from pipeline.models.detection import Candidate
    from pipeline.weights import WeightFiles


class Finder(Protocol):
    """Finds faces in a photo."""

    def find(self, rgb: Pixels) -> "Sequence[Candidate]":
        """All faces of a photo (H, W, 3); none: an empty sequence."""


class Recogniser(Protocol):
    """Tells people apart."""

    def embed(self, crop: Pixels) -> NDArray[np.float32]:
        """An ArcFace crop (112, 112, 3) -> (512,), not normalised."""


class Parser(Protocol):
    """Tells a face's parts apart."""

    def labels(self, aligned: Pixels) -> NDArray[np.uint8]:
        """An FFHQ crop (512, 512, 3) -> BiSeNet's number for each pixel (512, 512)."""


@dataclass(frozen=True, slots=True, eq=False)
class FaceModels:
    """What a FaceDetector works with; `files` are names and sha256 of the model files, for the trace.

    detector finds the faces to pick from. aligner finds the picked face once more, for the crop that is parsed; where
    it does not, or is None, the detector's own points do.
    """

    detector: Finder
    recogniser: Recogniser
    aligner: Finder | None
    parser: Parser
    files: Mapping[str, str]


def load_models(settings: Settings) -> FaceModels:
    """The face networks of a preset; raises WeightsError, SettingsInvalid."""
    from pipeline import checkpoints

    return read_models(
        checkpoints.files(settings), checkpoints.sizes(settings).bisenet_width, str(checkpoints.device(settings))
    )


def read_models(files: "WeightFiles", bisenet_width: int, device: str) -> FaceModels:
    """insightface's and facexlib's networks, from files and never from the network; raises WeightsError.

    A preset without RetinaFace has no aligner.
    """
    from pipeline.models import detection

    roles = [role for role in ("detector", "recogniser", "retinaface", "parsing") if files.has(role)]
    aligner, parser = None, detection.build_bisenet(bisenet_width)
    if "retinaface" in roles:
        network = _torch(detection.build_retinaface(device), files.path("retinaface"), device, files.mend)
        aligner = detection.RetinaFaceFinder(network)
    return FaceModels(
        load_finder(files.path("detector"), device, mend=files.mend),
        load_recogniser(files.path("recogniser"), device, files.mend),
        aligner,
        detection.BiSeNetParser(_torch(parser, files.path("parsing"), device, files.mend)),
        files.hashes(*roles),
    )


def _another(_: Path) -> str:
    """What to do about a damaged file that belongs to no preset."""
    return "name another file"


def load_finder(
    path: Path, device: str = "cpu", sizes: Sequence[int] | None = None, mend: Callable[[Path], str] = _another
) -> Finder:
    """insightface's SCRFD alone, at the sizes of the official pipeline or at these; raises WeightsCorrupt.

    mend: what a caller is told to do about a damaged file.
    """
    from insightface.model_zoo.scrfd import SCRFD

    from pipeline.models import detection

    return detection.ScrfdFinder(_onnx(SCRFD, 9, path, device, mend), sizes or detection.SCRFD_SIZES)


def load_recogniser(path: Path, device: str = "cpu", mend: Callable[[Path], str] = _another) -> Recogniser:
    """A network with ArcFace's interface, from an ONNX file; raises WeightsCorrupt, and `mend` as in load_finder."""
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    from pipeline.models import detection

    return detection.ArcFaceRecogniser(_onnx(ArcFaceONNX, 1, path, device, mend))


def _onnx(network: Callable[..., Any], outputs: int, path: Path, device: str, mend: Callable[[Path], str]) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as failures

    gpu = ("CUDAExecutionProvider", {"device_id": device.partition(":")[2] or "0"})
    providers = [gpu, "CPUExecutionProvider"] if device.startswith("cuda") else ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except (failures.Fail, failures.InvalidGraph, failures.InvalidProtobuf, failures.InvalidArgument) as error:
        raise WeightsCorrupt(f"{path} cannot be read as an ONNX model; {mend(path)}.") from error
    if len(session.get_outputs()) != outputs:
        raise WeightsCorrupt(f"{path} is another model: it has not the {outputs} output(s) it should; {mend(path)}.")
    return network(model_file=str(path), session=session)


def _torch(network: "nn.Module", path: Path, device: str, mend: Callable[[Path], str]) -> Any:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        # RetinaFace was saved from a DataParallel model, whose names have a prefix
        network.load_state_dict({name.removeprefix("module."): weight for name, weight in state.items()})
    except (
        *(SafetensorError, pickle.UnpicklingError),
        *(OSError, EOFError, RuntimeError, AttributeError, ValueError),
    ) as error:
        raise WeightsCorrupt(f"{path} does not hold the weights it should; {mend(path)}.") from error
    return network.to(device).eval().requires_grad_(False)

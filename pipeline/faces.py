"""FaceDetector: the photos of one person -> the face picked in each (detect, pick, embed, align, parse).

The official code takes ArcFace's face from one detector (the largest) and EVA-CLIP's from another (the most central),
so a group photo can mix two people. Here one face is picked and used for both.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.caches import Cache, IsCancelled, digest, people_cache, read_only, revision
from pipeline.errors import Cancelled, FaceIndexOutOfRange, NoFace, WeightsCorrupt
from pipeline.reading import Reading
from pipeline.request import Person, Photo
from pipeline.settings import Settings
from pipeline.trace import Trace

if TYPE_CHECKING:
    from torch import nn

    from pipeline.models.detection import Candidate
    from pipeline.weights import WeightFiles

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB


@dataclass(frozen=True, slots=True, eq=False)
class FaceBox:
    """Where a used face is: photo index, box (left, top, right, bottom), score in 0..1.

    The box is in pixels of the photo as it is read: upright, and scaled down to `photos.long_edge` where it is larger.
    """

    photo: int
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Face:
    """One face, ready for the identity encoder.

    embedding (512,) float32: ArcFace's raw output, not normalised. features (336, 336) float32: the aligned face in
    gray on white, resized but not clamped (the official code does not), before normalisation. landmarks (5, 2) float32,
    in the box's pixels.
    """

    embedding: NDArray[np.float32]
    features: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    box: FaceBox


@dataclass(frozen=True, slots=True, eq=False)
class Faces:
    """The faces of one person, one per photo, in the photos' order."""

    faces: tuple[Face, ...]
    trace: Trace


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


def _bytes(face: Face | int) -> int:
    return face.embedding.nbytes + face.features.nbytes + face.landmarks.nbytes if isinstance(face, Face) else 0


class FaceDetector:
    """Turns the photos of a person into faces.

    A photo is not turned: a face that lies or stands on its head is used, upright, where the detector finds it. A tiny
    face, or one cut by the photo's border, is used as it is; box and score say so. `cache` keeps, by photo and choice,
    the face, or how many there are where the chosen one is not among them.
    """

    def __init__(
        self,
        read: Callable[[Photo, str], Pixels],
        models: FaceModels,
        cache: Cache[Face | int] | None = None,
        known: Cache[bytes] | None = None,
    ) -> None:
        """`read`, `known`: see pipeline.reading.Reading; without a cache nothing is kept."""
        self._read, self._models = read, models
        self._revision = revision(models.files)
        self.cache = Cache(0, _bytes) if cache is None else cache
        self._known = Cache(0, bytes.__len__) if known is None else known
        # Photos may be read side by side; the networks take turns: insightface and facexlib keep state between steps.
        self._networks = threading.Lock()

    @classmethod
    def load(cls, settings: Settings, models: FaceModels | None = None) -> Self:
        """With these networks, or the preset's, which are read from its files; raises WeightsError, SettingsInvalid."""
        # torch takes seconds to import: now, and not while the first request waits
        import pipeline.models.face_features  # noqa: F401
        from pipeline.photos import PhotoReader

        cache, known = people_cache(settings.cache, _bytes), people_cache(settings.cache, bytes.__len__)
        return cls(PhotoReader(settings).read, models or load_models(settings), cache, known)

    def detect(self, person: Person, index: int, tenant: str = "", cancelled: IsCancelled = lambda: False) -> Faces:
        """One face per photo of people[index]; in those that the tenant has sent before it is not sought again.

        `cancelled` is asked before every photo, and makes it raise Cancelled. Raises PhotoError, NoFace,
        FaceIndexOutOfRange, naming the photo; and MaskUnreadable, before a GPU has worked in vain.
        """
        started = time.perf_counter()
        if person.mask is not None:
            from pipeline.photos import mask_grid

            mask_grid(person.mask, 1, 1, f"people[{index}].mask")
        faces = []
        for number in range(len(person.photos)):
            if cancelled():
                raise Cancelled("The request was cancelled; its other photos were not read.")
            faces.append(self._face(person, index, number, tenant, cancelled))
        return Faces(tuple(faces), Trace({"faces": time.perf_counter() - started}, self._models.files))

    def _face(self, person: Person, index: int, number: int, tenant: str, cancelled: IsCancelled) -> Face:
        name = f"people[{index}].photos[{number}]"
        photo = Reading(self._read, person.photos[number], name)
        key = (tenant, digest(self._revision, str(person.face), photo.digest(self._known, tenant)))
        face = self.cache.get_or_compute(key, lambda: self._find(photo.pixels(), person.face, cancelled), cancelled)
        if isinstance(face, Face):
            return replace(face, box=replace(face.box, photo=number))
        if face == 0:
            raise NoFace(f"{name} shows no face; send one with a face that is upright, sharp, well lit and not small.")
        raise FaceIndexOutOfRange(
            f"people[{index}].face is {person.face}, but {name} has {face} face(s), counted from 0 at the left; choose "
            "a smaller number."
        )

    def _find(self, rgb: Pixels, wanted: str | int, cancelled: IsCancelled) -> Face | int:
        """The wanted face, as of photo 0, or how many there are; it names no photo, as others may wait for it."""
        from pipeline.models.detection import choose, usable

        size = (rgb.shape[1], rgb.shape[0])
        with self._networks:
            if cancelled():
                raise Cancelled("The request was cancelled; its photo was not searched.")
            found = usable(self._models.detector.find(rgb), size)
            face = choose(found, wanted, size) if found else None
            return len(found) if face is None else self._prepared(rgb, face)

    def _prepared(self, rgb: Pixels, face: "Candidate") -> Face:
        from pipeline.models.alignment import arcface_crop, ffhq_crop
        from pipeline.models.face_features import gray_on_white

        aligned = ffhq_crop(rgb, self._alignment_points(rgb, face))
        features = gray_on_white(aligned, self._models.parser.labels(aligned))
        left, top, right, bottom = np.clip(face.box, 0, np.tile((rgb.shape[1], rgb.shape[0]), 2)).tolist()
        return Face(
            embedding=read_only(self._models.recogniser.embed(arcface_crop(rgb, face.landmarks))),
            features=read_only(features.numpy()),
            landmarks=read_only(face.landmarks),
            box=FaceBox(0, (left, top, right, bottom), face.score),
        )

    def _alignment_points(self, rgb: Pixels, face: "Candidate") -> NDArray[np.float32]:
        from pipeline.models.detection import same_face, usable

        aligner = self._models.aligner
        again = [] if aligner is None else usable(aligner.find(rgb), (rgb.shape[1], rgb.shape[0]))
        return (same_face(face, again) or face).landmarks


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

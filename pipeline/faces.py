"""FaceDetector: the photos of one person -> the face picked in each (detect, pick, embed, align, parse).

The official code takes ArcFace's face from one detector (the largest) and EVA-CLIP's from another (the most central),
so a group photo can mix two people. Here one face is picked and used for both.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.caches import Cache, IsCancelled, digest, people_cache, read_only, revision
from pipeline.errors import Cancelled, FaceIndexOutOfRange, NoFace
from pipeline.face_models import FaceModels, load_models
from pipeline.reading import Reading
from pipeline.request import Person, Photo
from pipeline.settings import Settings
from pipeline.trace import Trace

if TYPE_CHECKING:
    from pipeline.models.detection import Candidate

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

    def purge(self) -> None:
        """Forget the faces, and the photos known by their text, whose time is over."""
        self.cache.purge()
        self._known.purge()

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

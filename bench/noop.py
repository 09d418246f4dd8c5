"""Stages that give records of true sizes and compute nothing, or take a known time; what is left is the serving."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.caches import Cache
from pipeline.curves import Curves, Shape
from pipeline.denoise import draw
from pipeline.drawing import Work
from pipeline.engine import Engine
from pipeline.faces import Face, FaceBox, Faces
from pipeline.identity import Identity
from pipeline.objects_memory import MemoryObjects
from pipeline.picture import Picture
from pipeline.request import Person, Request
from pipeline.settings import Settings
from pipeline.text import Text
from pipeline.trace import Trace, total

if TYPE_CHECKING:
    from deployments.app import Parts

PICTURE_BYTES = 1_500_000  # about what a portrait of FLUX takes as PNG
STEP_SECONDS = 0.05  # of TimedDenoise


class _Stage:
    """What all have: nothing is cached, as nothing is computed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cache: Cache[Any] = Cache(0, size=lambda _: 0)


class NoFaces(_Stage):
    """One face for each photo."""

    def purge(self) -> None:
        """Nothing is kept."""

    def detect(self, person: Person, index: int, tenant: str = "", cancelled: Any = None) -> Faces:  # noqa: ARG002
        """See pipeline.faces.FaceDetector."""
        zeros = np.zeros((336, 336), np.float32)
        box = FaceBox(0, (1.0, 2.0, 30.0, 40.0), 0.9)
        face = Face(np.zeros(512, np.float32), zeros, np.zeros((5, 2), np.float32), box)
        return Faces((face,) * len(person.photos), Trace({"faces": 0.0}))


class NoIdentity(_Stage):
    """Tokens of nobody."""

    def encode(self, faces: Faces, fusion: str, tenant: str = "") -> Identity:  # noqa: ARG002
        """See pipeline.identity.IdentityEncoder."""
        boxes = tuple(face.box for face in faces.faces)
        return Identity(np.zeros((32, 2048), np.float32), boxes, faces.trace + Trace({"identity": 0.0}))


class NoText(_Stage):
    """A text that says nothing."""

    def encode(self, prompt: str, length: int) -> Text:  # noqa: ARG002
        """See pipeline.text.TextEncoder."""
        tokens = np.zeros((length, 4096), np.float32)
        return Text(tokens, np.zeros(768, np.float32), False, Trace({"text": 0.0}))


@dataclass(slots=True)
class Begun:
    """A picture that is not drawn."""

    work: Work
    began: float


class NoDenoise(_Stage):
    """A painter whose steps take no time, and the engines over it."""

    seconds = 1e-6  # of a step, as the engine is told
    waits = False

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._data = np.random.default_rng(0).bytes(PICTURE_BYTES)

    def engine(self) -> Engine:
        """See pipeline.denoise.FluxDenoiser."""
        limits, curves = self.settings.engine, Curves()
        curves.learn(Shape(1, 1, 1), 1, self.seconds)
        return Engine(self, curves, limits.max_jobs, self.settings.max_rows, limits.preview_steps)

    def purge(self) -> None:
        """Nothing is kept that could be."""

    def check(self) -> None:
        """It is alone, and never out of step."""

    def compiler_idle_seconds(self) -> float:
        """Nothing is ever compiled."""
        return math.inf

    def denoise(
        self,
        request: Request,
        number: int,
        text: Text,
        negative: Text | None,
        *identities: Identity,
        expires: float | None = None,
    ) -> Picture:
        """See pipeline.denoise.FluxDenoiser."""
        work = Work(request, number, text, negative, identities)
        picture: Picture = draw(Engine(self, Curves(), max_jobs=1), work, expires=expires)
        return picture

    def shape(self, work: Work) -> Shape:  # noqa: ARG002
        """See pipeline.engine.Painter, as for all that follow."""
        return Shape(1, 1, 1)

    def steps(self, work: Work) -> int:
        """As many as were asked for."""
        return work.request.num_steps

    def passes(self, work: Work, done: int) -> int:
        """One for each step."""
        return self.steps(work) - done

    def begin(self, work: Work) -> Begun:
        """Nothing but the moment."""
        return Begun(work, time.perf_counter())

    def advance(self, drawings: Sequence[Begun]) -> None:
        """Take the time that steps of these rows take, one after another."""
        if self.waits:
            threading.Event().wait(self.seconds * len(drawings))  # leaves the processor to others, as a GPU does

    def preview(self, drawing: Begun) -> Any:  # noqa: ARG002
        """A gray one."""
        return np.zeros((144, 112, 3), np.uint8)

    def relieve(self, error: Exception) -> bool:  # noqa: ARG002
        """It needs no memory."""
        return False

    def finish(self, drawing: Begun) -> Picture:
        """The same bytes for everybody."""
        work = drawing.work
        seconds = {"queue": drawing.began - work.accepted, "denoise": time.perf_counter() - drawing.began}
        traces = [*(identity.trace for identity in work.identities), work.text.trace, Trace(seconds)]
        return finished(work, self._data, total(traces))


def finished(work: Work, data: bytes, trace: Trace) -> Picture:
    """A picture that is said to be a PNG of these bytes."""
    request = work.request
    return Picture(
        data=data,
        media_type="image/png",
        width=request.width,
        height=request.height,
        seed=work.seed,
        steps=request.num_steps,
        prompt_truncated=False,
        faces=tuple(identity.boxes for identity in work.identities),
        trace=trace,
    )


class TimedDenoise(NoDenoise):
    """A painter whose steps take STEP_SECONDS a row."""

    seconds = STEP_SECONDS
    waits = True


class LastObjects(MemoryObjects):
    """The last objects that were written, in the memory of one process."""

    kept = 256

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        etag = super()._write(key, data, expected)
        while len(self._objects) > self.kept:
            del self._objects[next(iter(self._objects))]
        return etag


def memory_objects(settings: Settings) -> LastObjects:  # noqa: ARG001
    """Objects for Parts."""
    return LastObjects()


def models(settings: Settings) -> dict[str, str]:  # noqa: ARG001
    """There are none."""
    return {}


def no_ops() -> "Parts":
    """Stages that take no time."""
    from deployments.app import Parts

    return Parts(NoFaces, NoIdentity, NoText, NoDenoise, memory_objects, models)


def timed() -> "Parts":
    """The same, but for a denoiser whose steps take time."""
    from deployments.app import Parts

    return Parts(NoFaces, NoIdentity, NoText, TimedDenoise, memory_objects, models)

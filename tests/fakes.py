"""Small real stages for tests: they compute something from their inputs, fail as the real ones do, and need no model.

Each notes what happened as empty files in `settings.weights_dir`, so that a test can see into other processes.
"""

import base64
import binascii
import hashlib
import math
import os
import threading
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from pipeline.caches import Cache, digest
from pipeline.curves import Curves, Shape
from pipeline.denoise import draw
from pipeline.drawing import Work
from pipeline.engine import Engine
from pipeline.errors import InternalError, NoFace, PhotoUnreadable
from pipeline.faces import Face, FaceBox, Faces
from pipeline.identity import Identity
from pipeline.objects_memory import MemoryObjects
from pipeline.picture import MEDIA_TYPES, Picture, encode
from pipeline.store import ImageStore, open_objects
from pipeline.text import Text
from pipeline.trace import Trace, total

NO_FACE = base64.b64encode(b"a wall").decode()
A_FACE = base64.b64encode(b"a face").decode()
POISON = base64.b64encode(b"a face that makes the encoder give NaN").decode()
ENDLESS = "a picture that is never finished"  # as a prompt: the loop ends only when it is cancelled
CRASH = "a picture that breaks the code: my secret"  # as a prompt: an unforeseen error that quotes it


def note(folder, *words):
    """Leave a note that other processes can read."""
    Path(folder, "-".join(str(word) for word in words)).touch()


def notes(folder, *words):
    """The notes that begin with these words, without them."""
    start = "-".join(words) + "-"
    return {path.name.removeprefix(start) for path in Path(folder).iterdir() if path.name.startswith(start)}


def _node():
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"


def noted_objects(settings):
    """The real objects, in a process that is then known to be the ingress."""
    note(settings.weights_dir, "loaded", "Ingress", os.getpid(), _node())
    return open_objects(settings.store)


def painted(seed=7):
    """A small finished picture of one face."""
    pixels = np.full((16, 16, 3), seed % 256, np.uint8)
    faces = ((FaceBox(0, (1.0, 2.0, 3.0, 4.0), 0.5),),)
    trace = Trace({"faces": 0.1, "queue": 0.0, "denoise": 1.0}, {"faces": "00"})
    return Picture(encode(pixels, "png", 80), "image/png", 16, 16, seed, 4, False, faces, trace)


def numbers(shape, *parts):
    """Numbers that follow from what they are made of."""
    digest = hashlib.sha256(b"|".join(parts)).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal(shape).astype(np.float32)


def _rebuild(kind, folder, *values):
    note(folder, "unpickled", kind.__name__, os.getpid())
    return kind(*values)


class Noted:
    """A record that leaves a note in every process that unpickles it."""

    def __reduce__(self):
        values = [getattr(self, field.name) for field in fields(self)]
        return _rebuild, (type(self), self.folder, *values)


@dataclass(frozen=True, eq=False)
class NotedFaces(Noted, Faces):
    folder: str = ""


@dataclass(frozen=True, eq=False)
class NotedIdentity(Noted, Identity):
    folder: str = ""


@dataclass(frozen=True, eq=False)
class NotedText(Noted, Text):
    folder: str = ""


class Fake:
    """A stage that says in which process and on which node it was loaded."""

    def __init__(self, settings):
        self.folder = str(settings.weights_dir)
        self.cache = Cache(0, size=lambda value: 0)
        note(self.folder, "loaded", type(self).__name__, os.getpid(), _node())


class FakeFaces(Fake):
    def purge(self):
        """It keeps nothing."""

    def detect(self, person, index, tenant="", cancelled=None):
        faces = []
        for number, photo in enumerate(person.photos):
            try:
                data = base64.b64decode(photo.base64 or "", validate=True)
            except binascii.Error as error:
                raise PhotoUnreadable(f"people[{index}].photos[{number}] is not valid base64.") from error
            if data == b"a wall":
                raise NoFace(f"people[{index}].photos[{number}] shows no face.")
            box = FaceBox(number, (1.0, 2.0, 30.0, 40.0), 0.75)
            embedding = np.full(512, np.nan, np.float32) if b"NaN" in data else numbers(512, data)
            faces.append(Face(embedding, numbers((336, 336), data), numbers((5, 2), data), box))
        return NotedFaces(tuple(faces), Trace({"faces": 0.25}, {"faces": "00"}), self.folder)


class FakeIdentity(Fake):
    def encode(self, faces, fusion, tenant=""):
        if not all(np.isfinite(face.embedding).all() for face in faces.faces):
            raise InternalError("The identity encoder gave numbers that are not finite; report this.")
        data = b"".join(face.embedding.tobytes() for face in faces.faces)
        trace = faces.trace + Trace({"identity": 0.25}, {"identity": "11"})
        return NotedIdentity(numbers((32, 2048), data), tuple(face.box for face in faces.faces), trace, self.folder)


class FakeText(Fake):
    def __init__(self, settings):
        super().__init__(settings)
        self.cache = Cache(10**8, size=lambda text: text.tokens.nbytes)

    def encode(self, prompt, length):
        return self.cache.get_or_compute(("", digest(prompt, str(length))), lambda: self._read(prompt, length))

    def _read(self, prompt, length):
        data = prompt.encode()
        trace = Trace({"text": 0.125}, {"text": "22"})
        return NotedText(numbers((length, 4096), data), numbers(768, data), len(prompt) > 1000, trace, self.folder)


@dataclass(eq=False)
class FakeDrawing:
    """Leaves a note when it is dropped before its end, as the drawing of a cancelled picture is."""

    work: Work
    folder: str
    step: int = 0

    def __del__(self):
        if self.step < self.work.request.num_steps or self.endless:
            note(self.folder, "stopped", self.work.seed, self.step)

    @property
    def endless(self):
        return self.work.request.prompt.startswith(ENDLESS)


class FakeDenoise(Fake):
    """A painter, and what FluxDenoiser makes of one."""

    def __init__(self, settings):
        super().__init__(settings)
        self.limits = settings.engine

    def engine(self):
        return Engine(self, Curves(), self.limits.max_jobs, preview_steps=self.limits.preview_steps)

    def denoise(self, request, number, text, negative, *identities, expires=None, on_step=None, cancelled=None):
        work = Work(request, number, text, negative, identities)
        return draw(Engine(self, Curves(), max_jobs=1), work, on_step, cancelled, expires)

    def purge(self):
        """It keeps nothing."""

    def check(self):
        """It is alone, and never out of step."""

    def compiler_idle_seconds(self):
        return math.inf

    def shape(self, work):
        return Shape(1, 1, 1)

    def steps(self, work):
        return 10**9 if work.request.prompt.startswith(ENDLESS) else work.request.num_steps

    def passes(self, work, done):
        return self.steps(work) - done

    def begin(self, work):
        if work.request.prompt == CRASH:
            raise ZeroDivisionError(work.request.prompt)
        if not work.text.tokens.flags.writeable:
            note(self.folder, "read_only", "tokens")
        return FakeDrawing(work, self.folder)

    def advance(self, drawings):
        for drawing in drawings:
            if drawing.endless:
                note(self.folder, "step", drawing.work.seed, drawing.step)
                threading.Event().wait(0.02)  # what a step of a picture takes
            drawing.step += 1

    def preview(self, drawing):
        return np.zeros((2, 2, 3), np.uint8)

    def relieve(self, error):
        return False

    def finish(self, drawing):
        work, request = drawing.work, drawing.work.request
        data = [record.tobytes() for record in (work.text.pooled, *(identity.tokens for identity in work.identities))]
        noise = numbers((request.height, request.width, 3), str(work.seed).encode(), *data)
        traces = [*(identity.trace for identity in work.identities), work.text.trace]
        return Picture(
            data=encode(
                np.clip(128 + 40 * noise, 1, 255).astype(np.uint8), request.output_format, request.output_quality
            ),
            media_type=MEDIA_TYPES[request.output_format],
            width=request.width,
            height=request.height,
            seed=work.seed,
            steps=request.num_steps,
            prompt_truncated=work.text.truncated,
            faces=tuple(identity.boxes for identity in work.identities),
            trace=total([*traces, Trace({"queue": 0.5, "denoise": 1.0}, {"flux": "33"})]),
        )


def memory_store():
    """Pictures in this process."""
    return ImageStore(MemoryObjects())


def memory_objects(settings):
    """Objects in this process, for Parts."""
    return MemoryObjects()


def fake_models(settings):
    """What the traces of the fakes say of model files, for Parts."""
    return {"faces": "00", "identity": "11"}

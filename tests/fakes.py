"""Small real stages for tests: they compute something from their inputs, fail as the real ones do, and need no model.

Each notes what happened as empty files in `settings.weights_dir`, so that a test can see into other processes.
"""

import base64
import binascii
import hashlib
import os
import threading
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from pipeline.denoise import MEDIA_TYPES, Picture, encode
from pipeline.errors import Cancelled, InternalError, NoFace, PhotoUnreadable
from pipeline.faces import Face, FaceBox, Faces
from pipeline.identity import Identity
from pipeline.store import open_store
from pipeline.stored import Content, Stored, checked_id, describe, find_picture, not_found
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


def noted_store(settings):
    """The real store, in a process that is then known to be the ingress."""
    note(settings.weights_dir, "loaded", "Ingress", os.getpid(), _node())
    return open_store(settings.store)


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
        note(self.folder, "loaded", type(self).__name__, os.getpid(), _node())


class FakeFaces(Fake):
    def detect(self, person, index, cancelled=None):
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
    def encode(self, faces, fusion):
        if not all(np.isfinite(face.embedding).all() for face in faces.faces):
            raise InternalError("The identity encoder gave numbers that are not finite; report this.")
        data = b"".join(face.embedding.tobytes() for face in faces.faces)
        trace = faces.trace + Trace({"identity": 0.25}, {"identity": "11"})
        return NotedIdentity(numbers((32, 2048), data), tuple(face.box for face in faces.faces), trace, self.folder)


class FakeText(Fake):
    def encode(self, prompt, length):
        data = prompt.encode()
        trace = Trace({"text": 0.125}, {"text": "22"})
        return NotedText(numbers((length, 4096), data), numbers(768, data), len(prompt) > 1000, trace, self.folder)


class FakeDenoise(Fake):
    def denoise(self, request, number, text, negative, *identities, on_step=None, cancelled=None):
        if request.prompt == CRASH:
            raise ZeroDivisionError(request.prompt)
        if not text.tokens.flags.writeable:
            note(self.folder, "read_only", "tokens")
        self._loop(request, on_step, cancelled or (lambda: False))
        seed = request.seed + number
        data = [record.tobytes() for record in (text.pooled, *(identity.tokens for identity in identities))]
        noise = numbers((request.height, request.width, 3), str(seed).encode(), *data)
        trace = total(
            [*(identity.trace for identity in identities), text.trace, Trace({"denoise": 1.0}, {"flux": "33"})]
        )
        return Picture(
            data=encode(
                np.clip(128 + 40 * noise, 1, 255).astype(np.uint8), request.output_format, request.output_quality
            ),
            media_type=MEDIA_TYPES[request.output_format],
            width=request.width,
            height=request.height,
            seed=seed,
            steps=request.num_steps,
            prompt_truncated=text.truncated,
            faces=tuple(identity.boxes for identity in identities),
            trace=trace,
        )

    def _loop(self, request, on_step, cancelled):
        endless, step = request.prompt.startswith(ENDLESS), 0
        while endless or step < request.num_steps:
            if cancelled():
                note(self.folder, "stopped", request.seed, step)
                raise Cancelled("The request was cancelled; its picture was not finished.")
            if endless:
                note(self.folder, "step", request.seed, step)
                threading.Event().wait(0.02)  # what a step of a picture takes
            step += 1
            if on_step is not None:
                on_step(step, request.num_steps)


class MemoryStore:
    """Pictures in this process."""

    def __init__(self):
        self.images = {}

    def check(self):
        """Nothing can be wrong with it."""

    def save(self, image_id, request, pictures):
        record = describe(image_id, request, pictures, 0.5)
        self.images[image_id] = (record, list(pictures))
        return Stored(image_id, tuple(f"memory:{number}" for number, _ in enumerate(pictures)), record)

    def record(self, image_id):
        if checked_id(image_id) not in self.images:
            raise not_found()
        return self.images[image_id][0]

    def content(self, image_id, number):
        entry = find_picture(self.record(image_id), number)
        return Content(entry["media_type"], data=self.images[image_id][1][number].data)

"""Stages for the soak: nearly no work, and pictures whose bytes say for whom they were made."""

import hashlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.noop import Begun, NoDenoise, NoFaces, NoIdentity, NoText, finished
from pipeline.picture import Picture
from pipeline.text import Text
from pipeline.trace import Trace

if TYPE_CHECKING:
    from deployments.app import Parts

STEP_SECONDS = 0.05
PICTURE_BYTES = 20_000


def pixels(prompt: str, seed: int) -> bytes:
    """What the picture of a prompt and a seed has to be."""
    digest = hashlib.sha256(f"{seed}|{prompt}".encode()).digest()
    return digest * (PICTURE_BYTES // len(digest))


class SoakText(NoText):
    """A text that says nothing, in as few tokens as the denoiser takes."""

    def encode(self, prompt: str, length: int) -> Text:  # noqa: ARG002
        """See pipeline.text.TextEncoder."""
        return Text(np.zeros((8, 4096), np.float32), np.zeros(768, np.float32), False, Trace({"text": 0.0}))


class SoakDenoise(NoDenoise):
    """A painter whose steps take STEP_SECONDS, however many rows they have."""

    seconds = STEP_SECONDS

    def advance(self, drawings: Any) -> None:  # noqa: ARG002
        """See pipeline.engine.Painter."""
        threading.Event().wait(self.seconds)

    def finish(self, drawing: Begun) -> Picture:
        """Bytes that follow from prompt and seed."""
        work = drawing.work
        return finished(work, pixels(work.request.prompt, work.seed), Trace({"queue": 0.0, "denoise": 0.0}))


def soak_parts() -> "Parts":
    """The stages above."""
    from deployments.app import Parts

    return Parts(NoFaces, NoIdentity, SoakText, SoakDenoise)

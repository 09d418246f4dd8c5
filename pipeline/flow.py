"""The whole way from a request to a stored picture, written once.

`chain` is the order of the stages. `generate` runs it in one process, where each stage answers with a value; the
ingress runs the very same `chain` with remote calls, where each stage answers with a promise that is handed on.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import IdentityNotFound
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.store import Store, Stored

if TYPE_CHECKING:
    from pipeline.faces import FaceModels


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages as callables. A result (or the promise of one) goes into the next call as it is.

    faces(person, index, tenant) -> Faces; identity(Faces, fusion, tenant) -> Identity; text(prompt, length) -> Text;
    denoise(request, number, text, negative_text, *identities) -> Picture.
    """

    faces: Callable[..., Any]
    identity: Callable[..., Any]
    text: Callable[..., Any]
    denoise: Callable[..., Any]


def load_stages(settings: Settings, faces: "FaceModels | None" = None) -> Stages:
    """All stages in this process, with their models, or with face networks that are loaded; raises WeightsError."""
    from pipeline.denoise import FluxDenoiser
    from pipeline.faces import FaceDetector
    from pipeline.identity import IdentityEncoder
    from pipeline.text import TextEncoder

    return Stages(
        faces=FaceDetector.load(settings, faces).detect,
        identity=IdentityEncoder.load(settings).encode,
        text=TextEncoder.load(settings).encode,
        denoise=FluxDenoiser.load(settings).denoise,
    )


def new_image_id() -> str:
    """An id that cannot be guessed: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def chain(request: Request, stages: Stages, tenant: str = "") -> list[Any]:
    """Start every stage of a request; returns its pictures, or the promises of them, in order.

    tenant: whose faces and identities may be used again.
    """
    for index, person in enumerate(request.people):
        if person.identity is not None:
            raise IdentityNotFound(f"people[{index}].identity: nothing is stored under this id; send photos instead")
    identities = [
        stages.identity(stages.faces(person, index, tenant), person.fusion, tenant)
        for index, person in enumerate(request.people)
    ]
    text = stages.text(request.prompt, request.max_sequence_length)
    negative = stages.text(request.negative_prompt, request.max_sequence_length) if request.uses_true_cfg else None
    bare = request.without_photos()
    return [stages.denoise(bare, number, text, negative, *identities) for number in range(request.num_outputs)]


def generate(request: Request, stages: Stages, store: Store) -> Stored:
    """A request becomes stored pictures, in this process: the reference for the deployments."""
    request = request.with_seed()
    return store.save(new_image_id(), request, chain(request, stages))

"""The whole way from a request to a stored picture, written once.

`chain` is the order of the stages. `generate` runs it in one process, where each stage answers with a value; the
ingress runs the very same `chain` with remote calls, where each stage answers with a promise that is handed on.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pipeline.errors import IdentityNotFound, IdentityOutdated
from pipeline.identities import open_identities
from pipeline.jobs import new_id
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.store import ImageStore, Stored

if TYPE_CHECKING:
    from pipeline.face_models import FaceModels


def _nothing_stored(*_: str) -> Any:
    raise IdentityNotFound("No identities are stored here; send photos instead.")


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages as callables. A result (or the promise of one) goes into the next call as it is.

    faces(person, index, tenant) -> Faces; identity(Faces, fusion, tenant) -> Identity; text(prompt, length) -> Text;
    denoise(request, number, text, negative_text, *identities, expires=...) -> Picture, `expires` only where there is a
    deadline; stored(identity_id, tenant) -> Identity, or raises IdentityNotFound, IdentityOutdated.
    """

    faces: Callable[..., Any]
    identity: Callable[..., Any]
    text: Callable[..., Any]
    denoise: Callable[..., Any]
    stored: Callable[[str, str], Any] = _nothing_stored


def load_stages(settings: Settings, faces: "FaceModels | None" = None) -> Stages:
    """All stages in this process, with their models, or with face networks that are loaded; raises WeightsError."""
    from pipeline.denoise import FluxDenoiser
    from pipeline.faces import FaceDetector
    from pipeline.identity import IdentityEncoder
    from pipeline.text import TextEncoder

    identities = cache(lambda: open_identities(settings))  # the store is for those who name somebody in it
    return Stages(
        faces=FaceDetector.load(settings, faces).detect,
        identity=IdentityEncoder.load(settings).encode,
        text=TextEncoder.load(settings).encode,
        denoise=FluxDenoiser.load(settings).denoise,
        stored=lambda identity_id, tenant: identities().load(identity_id, tenant),
    )


def chain(request: Request, stages: Stages, tenant: str = "", expires: float | None = None) -> list[Any]:
    """Start every stage of a request; returns its pictures, or the promises of them, in order.

    expires: when the denoiser gives up, in seconds since 1970, as clocks of other nodes have them too.
    tenant: whose faces and identities may be used again, and whose stored identities can be named. A person of a stored
    identity needs no stage before the denoiser. Raises IdentityNotFound, IdentityOutdated before any stage starts.
    """
    stored = stored_people(request, stages.stored, tenant)
    identities = [
        stored[index]
        if index in stored
        else stages.identity(stages.faces(person, index, tenant), person.fusion, tenant)
        for index, person in enumerate(request.people)
    ]
    text = stages.text(request.prompt, request.max_sequence_length)
    negative = stages.text(request.negative_prompt, request.max_sequence_length) if request.uses_true_cfg else None
    bare = request.without_photos()
    denoise = stages.denoise if expires is None else partial(stages.denoise, expires=expires)
    return [denoise(bare, number, text, negative, *identities) for number in range(request.num_outputs)]


def stored_people(request: Request, stored: Callable[[str, str], Any], tenant: str) -> dict[int, Any]:
    """The stored identities of a request, by the index of the person; raises IdentityNotFound, IdentityOutdated."""
    found = {}
    for index, person in enumerate(request.people):
        try:
            if person.identity is not None:
                found[index] = stored(person.identity, tenant)
        except (IdentityNotFound, IdentityOutdated) as error:
            raise type(error)(f"people[{index}].identity: {error}") from None
    return found


def generate(request: Request, stages: Stages, store: ImageStore) -> Stored:
    """A request becomes stored pictures, in this process: the reference for the deployments."""
    request, seconds = request.with_seed(), request.deadline_seconds
    expires = None if seconds is None else time.time() + seconds
    return store.save(new_id(), request, chain(request, stages, expires=expires))

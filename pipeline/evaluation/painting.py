"""Pictures for the evaluation, by the stages of the service in this process."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import SettingsInvalid
from pipeline.evaluation.people import Case, Subject, pixels
from pipeline.faces import Pixels
from pipeline.flow import Stages
from pipeline.identity import Identity
from pipeline.request import Person, Photo, Request
from pipeline.text import Text


@dataclass(frozen=True, slots=True)
class Condition:
    """How the identity acts in a picture: how strongly, and from which step."""

    id_weight: float
    start_step: int = 0

    @property
    def name(self) -> str:
        """What the report's keys end in: the weight, or start_N for a weight of 1 from step N."""
        weight = f"{self.id_weight:g}"
        if not self.start_step:
            return weight
        return f"start_{self.start_step}" if self.id_weight == 1 else f"{weight}_start_{self.start_step}"


NOBODY = Condition(0.0)
FULL = Condition(1.0)


def conditions(
    id_weights: Iterable[float], start_steps: Iterable[int] = (0,), num_steps: int = 20
) -> tuple[Condition, ...]:
    """Each weight from the first step on, and a weight of 1 from each later step; NOBODY and FULL are always there.

    Raises SettingsInvalid for what the service would refuse.
    """
    wanted = {NOBODY, FULL} | {Condition(float(weight)) for weight in id_weights}
    wanted |= {Condition(1.0, step) for step in start_steps}
    for each in wanted:
        if not (0 <= each.id_weight <= 3 and 0 <= each.start_step < min(num_steps, 11)):
            raise SettingsInvalid(
                f"id_weight {each.id_weight:g} from step {each.start_step} of {num_steps}: a weight is 0 to 3, a first "
                "step 0 to 10 and less than the number of steps."
            )
    return tuple(sorted(wanted, key=lambda each: (each.start_step, each.id_weight)))


@dataclass(frozen=True, slots=True)
class Format:
    """What all pictures of an evaluation share."""

    width: int
    height: int
    num_steps: int = 20
    guidance_scale: float = 4.0

    def request(self, case: Case, people: Iterable[Person], wide: int = 1) -> Request:
        """A request for a case's prompt and noise with these people; `wide`: as many of the usual widths."""
        return Request(people=tuple(people), **self.fields(case, wide))

    def fields(self, case: Case, wide: int = 1) -> dict[str, Any]:
        """What a case asks for without people, by the names of a request's fields."""
        return {
            "prompt": case.prompt,
            "seed": case.seed,
            "width": self.width * wide,
            "height": self.height,
            "num_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
        }


@dataclass
class Painter:
    """Makes the pictures of subjects; each identity is encoded once, and each prompt.

    models: the sha256 of every model file that a picture came from, by name.
    """

    stages: Stages
    format: Format
    models: dict[str, str] = field(default_factory=dict)
    _identities: dict[tuple[object, ...], Identity] = field(default_factory=dict)
    _texts: dict[tuple[str, int], Text] = field(default_factory=dict)

    def paint(self, subject: Subject, case: Case, condition: Condition) -> Pixels:
        """The picture of a case, (height, width, 3). Raises what the stages raise: NoFace, PictureInvalid."""
        request = self.request(subject, case, condition)
        return self.picture(request, *(self.identity(person) for person in request.people))

    def request(self, subject: Subject, case: Case, condition: Condition) -> Request:
        """What a caller of the service would send for this picture."""
        someone = Person(
            photos=(photo(subject.reference),), id_weight=condition.id_weight, start_step=condition.start_step
        )
        return self.format.request(case, (someone,))

    def identity(self, person: Person) -> Identity:
        """The identity of a person's photos; how strongly and where it acts is another matter."""
        key = (*person.photos, person.face, person.fusion)
        if key not in self._identities:
            self._identities[key] = self.stages.identity(self.stages.faces(person, 0), person.fusion)
        return self._identities[key]

    def picture(self, request: Request, *identities: Identity) -> Pixels:
        """The picture of a request without true CFG, of people with these identities."""
        read = (request.prompt, request.max_sequence_length)
        if read not in self._texts:
            self._texts[read] = self.stages.text(*read)
        made = self.stages.denoise(request.without_photos(), 0, self._texts[read], None, *identities)
        self.models.update(made.trace.models)
        return pixels(made.data)


def photo(data: bytes) -> Photo:
    """An image file as a request holds it."""
    return Photo(base64=base64.b64encode(data).decode())

"""What a caller asks for: Request, Person, Photo, Mask, NewIdentity. Each validates itself and never changes.

Names are the field's own; ranges and defaults are those of the official PuLID-FLUX app (app_flux.py).
"""

import secrets
import unicodedata
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.types import NonNegativeInt

MAX_SEED = 2**64 - 1
MAX_PEOPLE = 4
MAX_PHOTOS = 8
MAX_NAME = 64  # characters of an identity's label
MAX_FIELDS = 100  # in one object of JSON, known or not
JobEvent = Literal["queued", "started", "step", "succeeded", "failed", "cancelled"]
JOB_EVENTS: tuple[JobEvent, ...] = get_args(JobEvent)
JOB_ENDS: tuple[JobEvent, ...] = ("succeeded", "failed", "cancelled")
NEGATIVE_PROMPT = "bad quality, worst quality, text, signature, watermark, extra limbs"
# Format characters hide what a prompt says and are refused, but for those that writing needs: the two joiners of
# scripts and emoji, and marks of Arabic, Syriac and Kaithi that can be seen.
WRITING = frozenset("\t\n\r\u200c\u200d\u06dd\u070f\u08e2\U000110bd\U000110cd") | {chr(c) for c in range(0x600, 0x606)}
FILLERS = frozenset("\u115f\u1160\u3164\uffa0")  # letters by their category, and blank


FaceChoice = Literal["largest", "center", "left", "right"] | NonNegativeInt
Fusion = Literal["mean", "concat"]


class Record(BaseModel):
    """Strict (no "28" for 28, no true for 1), closed (no unknown fields), frozen, without NaN and infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        # Each wrong field or entry costs a kilobyte of error; see also _few.
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError("has far more fields than there are")
        return value


def _visible(value: str) -> str:
    for position, character in enumerate(value):
        if character in FILLERS or (unicodedata.category(character) in ("Cc", "Cf") and character not in WRITING):
            raise ValueError(f"remove the invisible character U+{ord(character):04X} at position {position}")
    return value


def _few(value: Any, most: int) -> Any:
    """A JSON list as a tuple; one that is too long is refused before its entries are looked at."""
    if isinstance(value, list):
        if len(value) > most:
            raise ValueError(f"give at most {most}, not {len(value)}")
        return tuple(value)
    return value


class Photo(Record):
    """Where a photo comes from: exactly one of base64 text and an address (https:// or s3://).

    In JSON a plain string will do: an address, a `data:` URL, or base64.
    """

    base64: str | None = Field(None, repr=False, description="JPEG, PNG or WebP bytes as base64")
    url: str | None = Field(None, repr=False, max_length=2048, description="an https:// or s3:// address")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lower().startswith("data:"):
            return {"base64": value}
        return {"url": value} if "://" in value[:16] else {"base64": value}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.base64 is None) == (self.url is None):
            raise ValueError("give exactly one of base64 and url")
        return self


class Mask(Record):
    """Where in the picture a person's identity acts: exactly one of a box and a gray picture (white: acts)."""

    box: tuple[float, float, float, float] | None = Field(
        None, description="left, top, right, bottom as fractions of the picture"
    )
    base64: str | None = Field(None, repr=False, max_length=8_000_000, description="a gray picture as base64")

    @field_validator("box", mode="before")
    @classmethod
    def _box_from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.box is None) == (self.base64 is None):
            raise ValueError("give exactly one of box and base64")
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    "a box is left, top, right, bottom with 0 <= left < right <= 1 and 0 <= top < bottom <= 1"
                )
        return self


class Person(Record):
    """One person of the picture: photos (or a stored identity), and how, when and where the identity acts."""

    photos: Annotated[tuple[Photo, ...], Field(max_length=MAX_PHOTOS)] = ()
    identity: str | None = Field(None, max_length=64, description="the id of a stored identity, instead of photos")
    face: FaceChoice = Field(
        "largest", description="which face of each photo; a number counts from left to right, from 0"
    )
    fusion: Fusion = Field("mean", description="how several photos become one identity")
    id_weight: float = Field(1.0, ge=0, le=3)
    start_step: int = Field(0, ge=0, le=10, description="first step at which the identity acts")
    end_step: int | None = Field(None, ge=1, le=30, description="first step at which it acts no more; null: never")
    mask: Mask | None = None

    @field_validator("photos", mode="before")
    @classmethod
    def _photos_from_list(cls, value: Any) -> Any:
        return _few(value, MAX_PHOTOS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.photos) == (self.identity is not None):
            raise ValueError("give either one to eight photos or the id of a stored identity")
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError("end_step must be greater than start_step")
        return self


class Request(Record):
    """A picture to be made. Without people it is plain FLUX."""

    prompt: str = Field(min_length=1, max_length=8192, repr=False)
    people: Annotated[tuple[Person, ...], Field(max_length=MAX_PEOPLE)] = ()
    negative_prompt: str = Field(
        NEGATIVE_PROMPT, max_length=8192, repr=False, description="used when true_cfg is above 1"
    )
    width: int = Field(896, ge=256, le=1536, multiple_of=16)
    height: int = Field(1152, ge=256, le=1536, multiple_of=16)
    num_steps: int = Field(28, ge=1, le=30)
    guidance_scale: float = Field(4.0, ge=1, le=10)
    true_cfg: float = Field(1.0, ge=1, le=10, description="classifier-free guidance with a second pass; 1 is off")
    timestep_to_start_cfg: int = Field(1, ge=0, le=20, description="first step of the second pass")
    max_sequence_length: int = Field(128, ge=128, le=512, multiple_of=128, description="T5 tokens read of the prompt")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="null: drawn at random, and told in the answer")
    num_outputs: int = Field(1, ge=1, le=4, description="pictures; picture n is drawn with seed + n")
    output_format: Literal["png", "jpg", "webp"] = "png"
    output_quality: int = Field(80, ge=1, le=100, description="for jpg and webp")
    priority: int = Field(0, ge=-10, le=10, description="pictures of a higher one are drawn first")
    deadline_seconds: float | None = Field(
        None, gt=0, description="after which the answer is deadline_exceeded; null: the service's own limit"
    )
    webhook: str | None = Field(
        None, max_length=2048, repr=False, description="an https:// address that is told what happens to a job"
    )
    webhook_events: Annotated[tuple[JobEvent, ...], Field(max_length=len(JOB_EVENTS))] = Field(
        JOB_ENDS, description="of what it is told"
    )

    @field_validator("people", mode="before")
    @classmethod
    def _people_from_list(cls, value: Any) -> Any:
        return _few(value, MAX_PEOPLE)

    @field_validator("webhook_events", mode="before")
    @classmethod
    def _events_from_list(cls, value: Any) -> Any:
        return _few(value, len(JOB_EVENTS))

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _visible_text(cls, value: str) -> str:
        return _visible(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(unicodedata.category(character)[0] in "LMNPS" for character in self.prompt):
            raise ValueError("prompt must say something")
        for index, person in enumerate(self.people):
            if person.start_step >= self.num_steps:
                raise ValueError(f"people[{index}].start_step must be less than num_steps ({self.num_steps})")
        return self

    @property
    def uses_true_cfg(self) -> bool:
        """Whether a second, negative pass runs; the threshold is the official app's."""
        return abs(self.true_cfg - 1.0) > 1e-2

    def with_seed(self) -> "Request":
        """Itself, with a seed drawn where none was given; below 2**53, so that every JSON client can keep it."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbelow(2**53)})

    def without_photos(self) -> "Request":
        """Itself without the photos' bytes and addresses: what the denoiser needs, and what may be kept."""
        people = tuple(person.model_copy(update={"photos": ()}) for person in self.people)
        return self.model_copy(update={"people": people, "webhook": None})


class NewIdentity(Record):
    """A person to be stored: photos, which face of each, and for how long."""

    photos: Annotated[tuple[Photo, ...], Field(min_length=1, max_length=MAX_PHOTOS)]
    face: FaceChoice = Field(
        "largest", description="which face of each photo; a number counts from left to right, from 0"
    )
    fusion: Fusion = Field("mean", description="how several photos become one identity")
    name: str | None = Field(None, min_length=1, max_length=MAX_NAME, repr=False, description="a label for its owner")
    seconds: float | None = Field(None, gt=0, description="after which it is erased; null: the service's own time")
    keep_photos: bool = Field(False, description="whether the photos are kept too; only those that come as bytes are")

    @field_validator("photos", mode="before")
    @classmethod
    def _photos_from_list(cls, value: Any) -> Any:
        return _few(value, MAX_PHOTOS)

    @field_validator("name")
    @classmethod
    def _visible_name(cls, value: str | None) -> str | None:
        return None if value is None else _visible(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.keep_photos and any(photo.base64 is None for photo in self.photos):
            raise ValueError("keep_photos keeps what is sent as bytes; send base64 or files, and no addresses")
        return self

    @property
    def person(self) -> Person:
        """Whom the photos show, as a request would say it."""
        return Person(photos=self.photos, face=self.face, fusion=self.fusion)

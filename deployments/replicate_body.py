"""The bodies of Replicate's API, and the Requests that they stand for.

The input is that of the model flux-pulid (replicate.com/bytedance/flux-pulid), with its names, ranges and defaults.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from deployments.body import record
from pipeline.errors import BadInput, InvalidRequest
from pipeline.request import JOB_ENDS, JobEvent, Person, Record, Request

MODEL = "flux-pulid"
OWN = f"pulid-serve/{MODEL}"
OWN_VERSION = "hidden"  # what Replicate calls the one version of a model that is run by its name
REFERENCE = re.compile(rf"(?:([A-Za-z0-9._-]{{1,64}}/{MODEL})(?::([0-9a-f]{{64}}))?|([0-9a-f]{{64}})|{OWN_VERSION})")
EVENTS: dict[str, tuple[JobEvent, ...]] = {
    "start": ("started",),
    "logs": ("step",),
    "output": ("succeeded",),
    "completed": JOB_ENDS,
}
FACE = "main_face_image"
PHOTO = "people[0].photos[0]"  # what a Request calls it
SIDES, TOKENS = (256, 1536, 16), (128, 512, 128)  # least, most, and the step that is rounded up to


class Create(Record):
    """A prediction to be made."""

    version: str | None = Field(None, description=f"{MODEL}'s, or OWNER/{MODEL}, or both joined by a colon")
    input: dict[str, Any] = Field(repr=False)
    webhook: Any = None
    webhook_completed: Any = Field(None, description="the older name of webhook, for the end alone")
    webhook_events_filter: tuple[Literal["start", "output", "logs", "completed"], ...] = Field((), max_length=4)
    stream: bool = Field(False, description="without effect: every prediction has an address of events")

    @field_validator("webhook_events_filter", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Input(Record):
    """The input of flux-pulid, and `identity` and `people` beside it. A Request checks the values."""

    prompt: Any = "portrait, color, cinematic"
    main_face_image: Any = Field(None, description="an address, one of POST /v1/files, or a data: URL")
    negative_prompt: Any = None
    width: Any = 896
    height: Any = 1152
    num_steps: Any = 20
    start_step: Any = 0
    guidance_scale: Any = 4.0
    id_weight: Any = 1.0
    seed: Any = None
    true_cfg: Any = 1.0
    max_sequence_length: Any = 128
    output_format: Any = "webp"
    output_quality: Any = 80
    num_outputs: Any = 1
    identity: Any = None
    people: Any = None


OF_PERSON = ("id_weight", "start_step")  # of the one in main_face_image, or the stored identity
APART = {FACE, "identity", "people", *OF_PERSON}  # fields that a Request has elsewhere


@dataclass(frozen=True, slots=True)
class Reference:
    """Which model a caller means: its name and version."""

    model: str = OWN
    version: str = OWN_VERSION

    @classmethod
    def parse(cls, text: str) -> "Reference | None":
        """From OWNER/NAME, OWNER/NAME:VERSION or VERSION; None where another model is meant.

        A version is 64 digits that say nothing of their model: each is taken for one of the model served here.
        """
        found = REFERENCE.fullmatch(text)
        return None if found is None else cls(found[1] or OWN, found[2] or found[3] or OWN_VERSION)


def reference(body: Create) -> Reference:
    """The model that a body names; raises InvalidRequest."""
    found = None if body.version is None else Reference.parse(body.version)
    if found is None:
        raise wrong("version", f"the model served here is {MODEL}: give OWNER/{MODEL}, or one of its versions")
    return found


def request(body: Create) -> Request:
    """What a body asks for; raises InvalidRequest with the names of the body's fields."""
    given = {name: value for name, value in body.input.items() if value is not None}
    with named(given):
        fields = record(Input, given)
    if fields.people is not None and (fields.main_face_image is not None or fields.identity is not None):
        raise wrong("input.people", f"it says all about every person; leave out {FACE} and identity")
    values = {name: value for name, value in dict(fields).items() if name not in APART and value is not None}
    values |= {
        "width": _up(fields.width, SIDES),
        "height": _up(fields.height, SIDES),
        "max_sequence_length": _up(fields.max_sequence_length, TOKENS),
        "timestep_to_start_cfg": fields.start_step,  # as flux-pulid has it
        "people": _people(fields) if fields.people is None else fields.people,
        **_webhook(body),
    }
    if fields.seed == -1:
        del values["seed"]
    with named(given):
        return record(Request, values)


def echo(given: Mapping[str, Any]) -> dict[str, Any]:
    """An input as it comes back and is kept: photos only as addresses, without what may be secret in those."""
    kept = {name: value for name, value in given.items() if name not in (FACE, "people")}
    if address := _address(given.get(FACE)):
        kept[FACE] = address
    if given.get("people") is not None:
        kept["people"] = [_person(person) for person in given["people"]]
    return kept


def said(text: str, given: Mapping[str, Any]) -> str:
    """A sentence about a Request, with the names of the input that it was made of."""
    if given.get("people") is not None:
        return text
    return text.replace(PHOTO, FACE).replace("people[0].", "").replace("people[0]", FACE)


@contextmanager
def named(given: Mapping[str, Any]) -> Iterator[None]:
    """Errors about an input, or the Request that was made of it, with the names of the body's fields."""
    try:
        yield
    except InvalidRequest as error:
        if not error.fields:
            raise
        fields = tuple((_field(field, given), said(problem, given)) for field, problem in error.fields)
        told = InvalidRequest(f"The request does not fit: {fields[0][0]}: {fields[0][1]}.")
        told.fields = fields
        raise told from None
    except BadInput as error:
        raise type(error)(said(str(error), given)) from None


def wrong(field: str, problem: str) -> InvalidRequest:
    """What is wrong with one field."""
    error = InvalidRequest(f"The request does not fit: {field}: {problem}.")
    error.fields = ((field, problem),)
    return error


def body_schema() -> dict[str, Any]:
    """How OpenAPI describes the body of POST /v1/predictions."""
    schema = Create.model_json_schema()
    schema["properties"]["input"] = input_schema()
    return schema


def input_schema() -> dict[str, Any]:
    """How OpenAPI describes the input: what a Request says of its fields, with the defaults of the model."""
    known = {**Person.model_json_schema()["properties"], **Request.model_json_schema()["properties"]}
    found = {}
    for name, own in Input.model_json_schema()["properties"].items():
        found[name] = {**(known.get(name, {}) if name != "people" else {}), **own}
        found[name].pop("multipleOf", None)  # other values are rounded up
        if found[name].get("default") is None:
            found[name].pop("default", None)
    found["people"] |= {"type": "array", "description": "as in a Request, in the place of the fields about one person"}
    return {"type": "object", "title": "Input", "properties": found, "additionalProperties": False}


def _people(fields: Input) -> list[dict[str, Any]]:
    person = {"photos": [fields.main_face_image]} if fields.main_face_image is not None else {}
    if fields.identity is not None:
        person["identity"] = fields.identity
    return [person | {name: getattr(fields, name) for name in OF_PERSON}] if person else []


def _webhook(body: Create) -> dict[str, Any]:
    if body.webhook is None:
        return {} if body.webhook_completed is None else {"webhook": body.webhook_completed}
    wanted = [event for name in body.webhook_events_filter or ("output", "completed") for event in EVENTS[name]]
    return {"webhook": body.webhook, "webhook_events": list(dict.fromkeys(wanted))}


def _up(value: Any, bounds: tuple[int, int, int]) -> Any:
    """A number within bounds, rounded up as flux-pulid rounds sizes; all else as it is, for a Request to refuse."""
    least, most, step = bounds
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return -(-value // step) * step
    return value


def _address(photo: Any) -> str | None:
    """The address of a photo without its query, where signatures stand; None where it came as bytes."""
    text = photo.get("url") if isinstance(photo, dict) else photo
    return text.partition("?")[0].partition("#")[0] if isinstance(text, str) and "://" in text[:16] else None


def _person(person: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in person.items() if name not in ("photos", "mask")}
    if addresses := [address for photo in person.get("photos", ()) if (address := _address(photo))]:
        kept["photos"] = addresses
    if isinstance(person.get("mask"), dict) and "box" in person["mask"]:
        kept["mask"] = person["mask"]
    return kept


def _field(field: str, given: Mapping[str, Any]) -> str:
    if field.startswith("webhook"):
        return "webhook_events_filter" if field.startswith("webhook_events") else "webhook"
    return "input" if field == "(body)" else f"input.{said(field, given)}"

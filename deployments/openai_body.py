"""The bodies of OpenAI's Images API, and the Requests that they stand for."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from deployments.body import read, record
from deployments.multipart import Part, is_multipart, read_form
from pipeline.errors import InvalidRequest, MalformedBody, UnsupportedContentType
from pipeline.request import Person, Record, Request

Chunks = AsyncIterator[bytes]
STEPS = {"low": 12, "medium": 20, "standard": 20, "high": 28, "hd": 28, "auto": 28, "xhigh": 30, "max": 30}
QUALITIES = {"standard": "medium", "hd": "high", "auto": "high"}  # what answers call them
FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # ours by OpenAI's names
OPENAI_MODELS = ("gpt-image-", "chatgpt-image-", "dall-e-")
LEGACY_MODELS = "dall-e-"  # which answer with addresses, where the others answer with bytes
TEXT_TOKENS = 512  # all that T5 reads, as these programs send long prompts and are not told what was cut
OF_REQUEST = ("num_steps", "guidance_scale", "true_cfg", "negative_prompt", "seed", "max_sequence_length")
OF_PERSON = ("identity", "id_weight", "start_step", "face")
NUMBERS = {"n", "output_compression", "partial_images", "num_steps", "guidance_scale", "true_cfg", "seed"}
NUMBERS |= {"max_sequence_length", "id_weight", "start_step", "face"}


class Body(Record):
    """What both routes understand. Fields of Any are a Request's or a Person's own, and are checked as theirs."""

    prompt: Any
    model: str | None = Field(None, max_length=64, description="one of GET /v1/models, or a name of OpenAI's")
    n: Any = 1
    size: str = Field("auto", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="auto, or WIDTHxHEIGHT")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="how many steps, where num_steps does not say"
    )
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="for jpeg and webp; 100 is the best")
    background: Literal["auto", "opaque"] = Field("auto", description="pictures are always opaque")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="with stream: how many previews of the first picture")
    moderation: Literal["auto", "low"] = Field("auto", description="without effect, as the four below")
    style: Literal["vivid", "natural"] | None = None
    input_fidelity: Literal["low", "high"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    num_steps: Any = None
    guidance_scale: Any = None
    true_cfg: Any = None
    negative_prompt: Any = None
    seed: Any = None
    max_sequence_length: Any = TEXT_TOKENS
    identity: Any = None
    id_weight: Any = None
    start_step: Any = None
    face: Any = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        """SDKs send null for what was not given."""
        return {name: given for name, given in value.items() if given is not None} if isinstance(value, dict) else value

    @property
    def as_url(self) -> bool:
        """Whether pictures are answered as addresses, and not as base64."""
        if self.response_format is not None:
            return self.response_format == "url"
        return (self.model or "").startswith(LEGACY_MODELS)

    def given(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of some fields that were sent."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True)
class Asked:
    """A body, and the Request that it stands for."""

    body: Body
    request: Request

    @property
    def look(self) -> dict[str, str]:
        """What answers and events repeat of it."""
        body, request = self.body, self.request
        return {
            "background": "opaque",
            "output_format": body.output_format,
            "quality": QUALITIES.get(body.quality, body.quality),
            "size": f"{request.width}x{request.height}",
        }


async def read_generation(headers: Mapping[str, str], chunks: Chunks, max_bytes: int, model: str) -> Asked:
    """The body of POST /v1/images/generations; raises as deployments.body.read. `model`: the one that is served."""
    return _asked(await read(Body, headers, chunks, max_bytes), [], model)


async def read_edit(headers: Mapping[str, str], chunks: Chunks, max_bytes: int, model: str) -> Asked:
    """The body of POST /v1/images/edits: a form whose pictures are photos of one person; raises as read_form."""
    if not is_multipart(headers):
        raise UnsupportedContentType("Send the photos as files, in a body of multipart/form-data.")
    parts = await read_form(headers, chunks, max_bytes)
    return await asyncio.to_thread(_from_form, parts, model)


def _from_form(parts: list[Part], model: str) -> Asked:
    photos: list[str] = []
    values: dict[str, Any] = {}
    for name, content in parts:
        if name in ("image", "image[]"):
            photos.append(content if isinstance(content, str) else base64.b64encode(content).decode())
        elif name == "mask":
            raise _wrong(name, "pictures are drawn anew, with the person of the photos, and not edited; send no mask")
        elif isinstance(content, bytes):
            raise _wrong(name if name in Body.model_fields else "(body)", "it has to be text, and not a file")
        elif name in values:
            raise MalformedBody("The body names one field twice; say it once.")
        elif content or name == "prompt":  # SDKs send nothing for what was not given
            values[name] = _value(name, content)
    body = record(Body, values)
    if not photos and body.identity is None:
        raise _wrong("image", "send one to eight photos of the person, or the id of a stored identity as identity")
    return _asked(body, photos, model)


def _value(name: str, text: str) -> Any:
    """A form knows only text; what is no number stays one, and is refused where a number is needed."""
    if name == "stream":
        return {"true": True, "false": False}.get(text.lower(), text)
    if name in NUMBERS and re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    if name in NUMBERS and re.fullmatch(r"-?[0-9]{1,20}\.[0-9]{1,20}", text):
        return float(text)
    return text


def _asked(body: Body, photos: list[str], model: str) -> Asked:
    if body.model not in (None, model) and not body.model.startswith(OPENAI_MODELS):
        raise _wrong("model", f"{model} is the one that is served here; name it, or leave it out")
    person = {**body.given(OF_PERSON), **({"photos": photos} if photos else {})}
    if person and not (photos or body.identity is not None):
        raise _wrong(next(iter(person)), "it is about a person: name one by identity, or send photos to /images/edits")
    width, height = (None, None) if body.size == "auto" else map(int, body.size.split("x"))
    values = {
        "prompt": body.prompt,
        "people": [person] if person else None,
        "width": width,
        "height": height,
        "num_outputs": body.n,
        "num_steps": STEPS[body.quality],
        "output_format": FORMATS[body.output_format],
        "output_quality": max(1, body.output_compression),
        **body.given(OF_REQUEST),
    }
    return Asked(body, record(Request, {name: value for name, value in values.items() if value is not None}))


def _wrong(field: str, problem: str) -> InvalidRequest:
    error = InvalidRequest(f"The request does not fit: {field}: {problem}.")
    error.fields = ((field, problem),)
    return error


def body_schema(edit: bool) -> dict[str, Any]:
    """How OpenAPI describes a body; the fields that are ours as a Request describes them."""
    theirs = Body.model_json_schema()["properties"]
    ours = {**Request.model_json_schema()["properties"], **Person.model_json_schema()["properties"]}
    named = {
        name: ours.get("num_outputs" if name == "n" else name, theirs[name])
        for name in theirs
        if not _typed(theirs[name])
    }
    properties = {**theirs, **named}
    if edit:
        properties["image"] = {"type": "array", "maxItems": 8, "items": {"type": "string", "format": "binary"}}
    return {"type": "object", "required": ["prompt"], "properties": properties, "additionalProperties": False}


def _typed(schema: Mapping[str, Any]) -> bool:
    return bool(schema.keys() & {"type", "anyOf", "enum", "$ref"})

"""What the OpenAPI document says of the routes that speak OpenAI's and Replicate's APIs."""

from typing import Any

from deployments.openai_errors import EDITS, GENERATIONS
from deployments.openapi_parts import (
    EVENT_ID,
    IDEMPOTENCY_KEY,
    LAST_EVENT_ID,
    PIXEL_CONTENT,
    PREFER,
    REPLAYED,
    Route,
    reference,
    stream,
)
from deployments.replicate_view import FILES, PREDICTIONS

MODEL = "/v1/models/{owner}/{name}"
ONE = f"{PREDICTIONS}/{{prediction_id}}"
CREATE: Route = ("post", PREDICTIONS)
CREATE_OF_MODEL: Route = ("post", f"{MODEL}/predictions")
STREAM: Route = ("get", f"{ONE}/stream")

TEXT: dict[str, Any] = {"type": "string"}
NUMBER: dict[str, Any] = {"type": "integer"}
MOMENT: dict[str, Any] = {"type": "string", "format": "date-time"}
LINK: dict[str, Any] = {"type": "string", "format": "uri"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _page(name: str) -> dict[str, Any]:
    return _object(
        previous={"type": "null"}, next={"type": "null"}, results={"type": "array", "items": reference(name)}
    )


def _answer(name: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": reference(name)}}}


DETAILS = _object(text_tokens=NUMBER, image_tokens=NUMBER)
PICTURE = {**_object(url=LINK, b64_json=TEXT), "required": []}
SCHEMAS: dict[str, Any] = {
    "OpenAIImages": _object(
        created=NUMBER,
        data={"type": "array", "items": PICTURE},
        background=TEXT,
        output_format=TEXT,
        quality=TEXT,
        size=TEXT,
        usage=_object(
            input_tokens=NUMBER,
            input_tokens_details=DETAILS,
            output_tokens=NUMBER,
            output_tokens_details=DETAILS,
            total_tokens=NUMBER,
        ),
    ),
    "OpenAIError": _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT))),
    "Prediction": _object(
        id=TEXT,
        model=TEXT,
        version=TEXT,
        input={"type": "object"},
        output=_or_null({"type": "array", "items": LINK}),
        error=_or_null(TEXT),
        status={"enum": ["starting", "processing", "succeeded", "failed", "canceled"]},
        logs=TEXT,
        created_at=MOMENT,
        started_at=_or_null(MOMENT),
        completed_at=_or_null(MOMENT),
        metrics={"type": "object", "properties": {"predict_time": {"type": "number"}}},
        urls=_object(get=LINK, cancel=LINK, stream=LINK),
        data_removed={"const": False},
        source={"const": "api"},
    ),
    "ReplicateModel": {"type": "object", "required": ["url", "owner", "name", "latest_version"]},
    "ReplicateVersion": {"type": "object", "required": ["id", "created_at", "cog_version", "openapi_schema"]},
    "ReplicateVersions": _page("ReplicateVersion"),
    "File": _object(
        id=TEXT,
        name=TEXT,
        content_type=TEXT,
        size=NUMBER,
        metadata={"type": "object"},
        etag=TEXT,
        checksums=_object(sha256=TEXT),
        created_at=MOMENT,
        expires_at=MOMENT,
        urls=_object(get=LINK),
    ),
    "Files": _page("File"),
    "WebhookSecret": _object(key={"type": "string", "pattern": "^whsec_"}),
}
PARAMETERS: dict[Route, list[dict[str, Any]]] = {
    CREATE: [PREFER, IDEMPOTENCY_KEY],
    CREATE_OF_MODEL: [PREFER, IDEMPOTENCY_KEY],
    STREAM: [LAST_EVENT_ID],
}
IMAGES = {
    "description": "the pictures; with `stream`, server-sent events",
    "content": {
        "application/json": {"schema": reference("OpenAIImages")},
        "text/event-stream": {"schema": reference("ServerSentEvent")},
    },
}
MADE = {
    "201": _answer("Prediction", "the prediction"),
    "202": _answer("Prediction", "with `Prefer: wait`, one that has not ended in time"),
}
OUTPUT = f"id: {EVENT_ID}\nevent: logs\ndata:  25%|█████               | 7/28\n\n"
CONTENTS: dict[Route, dict[str, dict[str, Any]]] = {
    ("post", GENERATIONS): {"200": IMAGES},
    ("post", EDITS): {"200": IMAGES},
    CREATE: MADE,
    CREATE_OF_MODEL: MADE,
    ("get", ONE): {"200": _answer("Prediction", "the prediction")},
    ("post", f"{ONE}/cancel"): {"200": _answer("Prediction", "the prediction, as it is then")},
    STREAM: {"200": stream("Server-sent events: `logs`, `output`, and `done` or `error` as the last one.", OUTPUT)},
    ("get", f"{ONE}/output/{{name}}"): {"200": {"description": "the pixels", "content": PIXEL_CONTENT}},
    ("get", MODEL): {"200": _answer("ReplicateModel", "the model")},
    ("get", f"{MODEL}/versions"): {"200": _answer("ReplicateVersions", "its one version")},
    ("get", f"{MODEL}/versions/{{version_id}}"): {"200": _answer("ReplicateVersion", "the version")},
    ("get", "/v1/webhooks/default/secret"): {"200": _answer("WebhookSecret", "the key, in base64 after its prefix")},
    ("post", FILES): {"201": _answer("File", "the file")},
    ("get", FILES): {"200": _answer("Files", "the files")},
    ("get", f"{FILES}/{{file_id}}"): {"200": _answer("File", "the file")},
}
ANSWER_HEADERS: dict[tuple[str, str, str], dict[str, Any]] = {
    (*route, status): {"Idempotency-Replayed": REPLAYED}
    for route in (CREATE, CREATE_OF_MODEL)
    for status in ("201", "202")
}

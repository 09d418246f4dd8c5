"""What the OpenAPI document says beyond what FastAPI finds in the routes: headers, parameters, pictures, events."""

from typing import Any

Route = tuple[str, str]  # method and path
MAKE: Route = ("post", "/v1/images")
EVENTS: Route = ("get", "/v1/images/{image_id}/events")
PIXELS: Route = ("get", "/v1/images/{image_id}/{number}")
ADD: Route = ("post", "/v1/identities")
ID = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
KINDS = ("image/png", "image/jpeg", "image/webp")
EVENT_ID = "1-7"
SECONDS = {"type": "integer", "minimum": 0}
ADDRESS = {"type": "string", "format": "uri-reference"}


def _header(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "schema": schema}


def reference(name: str) -> dict[str, Any]:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def stream(description: str, example: str) -> dict[str, Any]:
    """A stream of events as an answer; the schema is that of each event."""
    return {
        "description": description,
        "content": {"text/event-stream": {"schema": reference("ServerSentEvent"), "example": example}},
    }


def _parameter(name: str, description: str, schema: dict[str, Any], example: str) -> dict[str, Any]:
    return {"name": name, "in": "header", **_header(description, schema), "example": example}


# --- what routes read

PATHS: dict[str, dict[str, Any]] = {
    "image_id": {"schema": ID, "description": "the id of an image, which is that of its job"},
    "prediction_id": {"schema": ID, "description": "the id of a prediction, which is that of its job"},
    "file_id": {"schema": ID, "description": "the id of a file"},
    "identity_id": {"schema": ID, "description": "the id of a stored identity"},
    "number": {"schema": {"type": "integer", "minimum": 0, "maximum": 3}, "description": "which picture, from 0"},
    "code": {"schema": {"type": "string", "pattern": "^[a-z_]{1,40}$"}, "description": "the code of an error"},
}
PREFER = _parameter(
    "Prefer",
    "RFC 7240. `respond-async`: answer with a job at once. `wait=N`: answer with pictures if they are there within N "
    "seconds, else with a job.",
    {"type": "string"},
    "respond-async",
)
IDEMPOTENCY_KEY = _parameter(
    "Idempotency-Key",
    "A name of your choice for this request, a UUID say: it is carried out once, however often it is sent.",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    "6e0d5bb4-5a3a-4b62-9a4f-0d2a3f6a8f11",
)
LAST_EVENT_ID = _parameter(
    "Last-Event-ID",
    "The `id` of the last event that arrived; those after it follow.",
    {"type": "string", "pattern": "^[0-9]{1,9}-[0-9]{1,9}$"},
    EVENT_ID,
)
PARAMETERS: dict[Route, list[dict[str, Any]]] = {MAKE: [PREFER, IDEMPOTENCY_KEY], EVENTS: [LAST_EVENT_ID]}

# --- what they answer

PIXEL_CONTENT = {kind: {"schema": {"type": "string", "contentMediaType": kind}} for kind in KINDS}
WATCHED = (
    "A stream of server-sent events. Each has `id: ATTEMPT-N`, an `event` and one line of JSON as `data`. `queued` "
    '{"position"}; `started` {"attempt"}; `step` {"number" (which picture), "step", "steps"}; `preview` {"number", '
    '"media_type", "data" (base64)}; and as the last one `succeeded`, `failed` or `cancelled`, each with the job.'
)
EVENT_LINES = (
    'id: 0-0\nevent: queued\ndata: {"position": 0}\n\nid: 1-0\nevent: started\ndata: {"attempt": 1}\n\n'
    'id: 1-1\nevent: step\ndata: {"number": 0, "step": 1, "steps": 28}\n\n: keep-alive\n\n'
)
# In the place of what FastAPI guesses, or beside it.
CONTENTS: dict[Route, dict[str, dict[str, Any]]] = {
    MAKE: {"303": {"description": "with `Accept: image/*`, where the first picture is; it needs no key"}},
    EVENTS: {"200": stream(WATCHED, EVENT_LINES)},
    PIXELS: {"200": {"description": "the pixels", "content": PIXEL_CONTENT}},
}
LINK = _header("the record of a picture that is the answer itself", {"type": "string"})
REPLAYED = _header("`true` where the Idempotency-Key had been used before", {"const": "true"})
LOCATION = _header("where it can be read", ADDRESS)
ANSWER_HEADERS: dict[tuple[str, str, str], dict[str, Any]] = {
    (*MAKE, "200"): {
        "Link": LINK,
        "Content-Location": _header("the address of a picture that is the answer itself", ADDRESS),
        "Idempotency-Replayed": REPLAYED,
    },
    (*MAKE, "202"): {
        "Location": LOCATION,
        "Retry-After": _header("seconds after which to look", SECONDS),
        "Preference-Applied": _header("what of Prefer was followed", {"type": "string"}),
        "Idempotency-Replayed": REPLAYED,
    },
    (*MAKE, "303"): {"Location": _header("a link to the pixels", ADDRESS), "Link": LINK},
    (*PIXELS, "307"): {"Location": _header("a link to the pixels, for a while", ADDRESS)},
    (*ADD, "201"): {"Location": LOCATION},
}
RETRY_AFTER = {"Retry-After": _header("seconds after which to try again", SECONDS)}
ERROR_HEADERS: dict[str, dict[str, Any]] = {
    "401": {"WWW-Authenticate": _header("`Bearer`", {"const": "Bearer"})},
    "429": RETRY_AFTER,
    "503": RETRY_AFTER,
}


SCHEMAS: dict[str, Any] = {
    "ServerSentEvent": {
        "type": "object",
        "required": ["event", "data"],
        "properties": {
            "id": {"type": "string", "pattern": "^[0-9]{1,9}-[0-9]{1,9}$"},
            "event": {"type": "string"},
            "data": {"type": "string"},
        },
    }
}

# --- what is sent to a request's webhook

WEBHOOK: dict[str, Any] = {
    "event": {
        "{$request.body#/webhook}": {
            "post": {
                "summary": "What happens to a job",
                "description": "Signed by the scheme of Standard Webhooks. A delivery is tried again until it is "
                "answered by 2xx; `webhook-id` is the same in each try.",
                "parameters": [
                    {**_parameter(name, description, {"type": "string"}, example), "required": True}
                    for name, description, example in (
                        ("webhook-id", "the delivery", "019c6f0e2d41c0ffee5a3b7e9d8f2a64-succeeded"),
                        ("webhook-timestamp", "seconds since 1970", "1772366400"),
                        (
                            "webhook-signature",
                            "of id, time and body",
                            "v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=",
                        ),
                    )
                ],
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {
                            "schema": {
                                "type": "object",
                                "required": ["type", "data"],
                                "properties": {"type": {"type": "string"}, "data": {"type": "object"}},
                            }
                        }
                    },
                },
                "responses": {"2XX": {"description": "it arrived"}, "410": {"description": "send no more"}},
            }
        }
    }
}

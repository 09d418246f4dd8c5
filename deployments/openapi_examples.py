"""Examples of requests and answers, for the OpenAPI document; tests hold each against its schema."""

from typing import Any

from deployments.openai_errors import EDITS, GENERATIONS
from deployments.openapi_parts import ADD, MAKE, Route
from deployments.problems import explain
from pipeline.errors import InvalidRequest, PipelineError

IMAGE_ID = "019c6f0e2d41c0ffee5a3b7e9d8f2a64"
IDENTITY_ID = "019c6f0c91b25d0e7a8c4f3b2e1d0a96"
ADDRESS = f"/v1/images/{IMAGE_ID}"
PROMPT = "portrait, color, cinematic"
PHOTO = "https://example.com/ada.jpg"
JSON = "application/json"

PICTURES = [{"url": f"{ADDRESS}/0", "seed": 42, "width": 896, "height": 1152, "media_type": "image/png"}]
FACE = {"photo": 0, "box": [172.0, 63.5, 271.0, 195.0], "score": 0.87}
TIMINGS = {"faces": 0.31, "identity": 0.05, "text": 0.03, "queue": 0.2, "denoise": 2.9, "store": 0.04, "total": 3.4}
MADE = {
    "id": IMAGE_ID,
    "record": ADDRESS,
    "images": PICTURES,
    "faces": [[FACE]],
    "prompt_truncated": False,
    "timings": TIMINGS,
}
JOB: dict[str, Any] = {
    "id": IMAGE_ID,
    "status": "running",
    "created": "2026-03-01T12:00:00.000+00:00",
    "record": ADDRESS,
    "events": f"{ADDRESS}/events",
    "cancel": f"{ADDRESS}/cancel",
    "position": None,
    "progress": {"step": 7, "steps": 28},
    "attempt": 1,
    "error": None,
    "images": [],
}
QUEUED = {**JOB, "status": "queued", "position": 3, "progress": None, "attempt": 0}
CANCELLED = {**JOB, "status": "cancelled"}
IDENTITY = {
    "id": IDENTITY_ID,
    "name": "Ada",
    "created": "2026-03-01T12:00:00.000+00:00",
    "expires": "2026-03-31T12:00:00.000+00:00",
    "fusion": "mean",
    "faces": [FACE, {**FACE, "photo": 1}],
    "similarity": [[1.0, 0.71], [0.71, 1.0]],
    "photos_kept": False,
}

# By route, media type and what the example shows.
REQUESTS: dict[Route, dict[str, dict[str, Any]]] = {
    MAKE: {
        JSON: {
            "a_prompt": {"prompt": PROMPT, "seed": 42},
            "a_person": {"prompt": PROMPT, "people": [{"photos": [PHOTO], "id_weight": 1.0, "start_step": 4}]},
            "a_stored_identity": {"prompt": PROMPT, "people": [{"identity": IDENTITY_ID}], "num_outputs": 2},
            "two_people": {
                "prompt": "two friends in a park",
                "width": 1152,
                "height": 896,
                "people": [
                    {"photos": [PHOTO], "mask": {"box": [0.0, 0.0, 0.5, 1.0]}},
                    {"identity": IDENTITY_ID, "mask": {"box": [0.5, 0.0, 1.0, 1.0]}},
                ],
            },
            "a_webhook": {
                "prompt": PROMPT,
                "webhook": "https://example.com/hooks/pulid",
                "webhook_events": ["started", "succeeded", "failed"],
            },
        }
    },
    ADD: {JSON: {"a_person": {"photos": [PHOTO, "https://example.com/ada-2.jpg"], "name": "Ada"}}},
    ("post", GENERATIONS): {
        JSON: {"a_prompt": {"prompt": PROMPT, "size": "1024x1024", "response_format": "url"}},
    },
    ("post", EDITS): {},
}
# By route, status and media type.
ANSWERS: dict[Route, dict[str, dict[str, Any]]] = {
    MAKE: {"200": {JSON: MADE}, "202": {JSON: QUEUED}},
    ("get", "/v1/images/{image_id}"): {"200": {JSON: JOB}},
    ("post", "/v1/images/{image_id}/cancel"): {"200": {JSON: CANCELLED}},
    ADD: {"201": {JSON: IDENTITY}},
    ("get", "/v1/identities"): {"200": {JSON: {"identities": [IDENTITY]}}},
    ("get", "/v1/identities/{identity_id}"): {"200": {JSON: IDENTITY}},
    ("get", "/healthz"): {"200": {JSON: {"status": "ok", "replicas": {"FluxDenoiser": 1, "Ingress": 1}}}},
    ("get", "/problems/{code}"): {
        "200": {JSON: {"code": "no_face", "status": 422, "title": "No face was found in a photo"}}
    },
}


def problem(kind: type[PipelineError], status: str) -> dict[str, Any]:
    """What an error looks like; `status` is that of the answer it stands in."""
    told = {
        "type": f"/problems/{kind.code}",
        "title": explain(kind)["title"],
        "status": int(status),
        "detail": f"{explain(kind)['title']}: here stands what to do.",
        "instance": "urn:uuid:6fa459ea-ee8a-3ca4-894e-db77e160355e",
        "code": kind.code,
    }
    if kind is InvalidRequest:
        told["detail"] = "The request does not fit: num_steps: Input should be less than or equal to 30."
        told["errors"] = [{"field": "num_steps", "problem": "Input should be less than or equal to 30"}]
    return told

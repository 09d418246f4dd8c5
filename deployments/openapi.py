"""The OpenAPI document, completed: keys, errors, headers and examples, for all routes in one place."""

import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from deployments import openapi_foreign, openapi_parts, problems
from deployments.openapi_examples import ANSWERS, REQUESTS, problem
from deployments.openapi_parts import ERROR_HEADERS, MAKE, PATHS, PIXEL_CONTENT, WEBHOOK, Route, reference
from pipeline.errors import (
    HostRefused,
    ImageNotFound,
    InternalError,
    KeyInvalid,
    PipelineError,
    RateLimited,
    StoreCorrupt,
    StoreMisconfigured,
    StoreUnavailable,
)
from pipeline.request import Request

METHODS = ("get", "post", "delete")
PARAMETERS = openapi_parts.PARAMETERS | openapi_foreign.PARAMETERS
CONTENTS = openapi_parts.CONTENTS | openapi_foreign.CONTENTS
ANSWER_HEADERS = openapi_parts.ANSWER_HEADERS | openapi_foreign.ANSWER_HEADERS
# By how their paths begin, the longest first; `{` keeps GET /v1/models apart from Replicate's below it.
TAGS = {
    "/v1/images/generations": "openai",
    "/v1/images/edits": "openai",
    "/v1/predictions": "replicate",
    "/v1/models/{": "replicate",
    "/v1/files": "files",
    "/v1/webhooks": "replicate",
    "/v1/identities": "identities",
    "/v1/images": "images",
}
DESCRIPTIONS = {
    "images": "Pictures of a person, made while you wait or as a job.",
    "identities": "People whose photos are read once, and whom requests then name by an id.",
    "openai": "OpenAI's Images API, for programs that speak it already.",
    "replicate": "Replicate's API, for programs that speak it already.",
    "files": "Replicate's files: photos that are sent ahead of the predictions that name them.",
    "service": "What runs here.",
}


def tag(path: str) -> str:
    """The group of routes that one belongs to."""
    return next((name for start, name in TAGS.items() if path.startswith(start)), "service")


def operation_id(route: APIRoute) -> str:
    """The name of a route for those who generate clients: its group and what it does."""
    return f"{tag(route.path)}_{route.name}"


def extend(app: FastAPI, keys_needed: bool) -> None:
    """Make the app's document complete; FastAPI keeps it once it is made."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = completed(plain(), keys_needed)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def completed(document: dict[str, Any], keys_needed: bool) -> dict[str, Any]:
    """FastAPI's document with all that its callers have to know."""
    document["info"]["license"] = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    document["tags"] = [{"name": name, "description": words} for name, words in DESCRIPTIONS.items()]
    components = document["components"]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "an API key"}}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nobody answers here
        components["schemas"].pop(name, None)
    components["schemas"].update(
        _request_schemas() | _problem_schemas() | openapi_parts.SCHEMAS | openapi_foreign.SCHEMAS
    )
    for path, operations in document["paths"].items():
        for method in METHODS:
            if method in operations:
                _complete(operations[method], method, path, keys_needed)
    return document


def _complete(operation: dict[str, Any], method: str, path: str, keys_needed: bool) -> None:
    operation["tags"] = [tag(path)]
    operation["summary"] = re.split(r"[.:;]\s", operation["description"])[0].rstrip(".").replace("\n", " ")
    if path.startswith("/v1"):
        operation["security"] = [{"key": []}] if keys_needed else [{"key": []}, {}]
    parameters = operation.get("parameters", [])
    for parameter in parameters:
        parameter.update(PATHS.get(parameter["name"], {}))
    parameters += PARAMETERS.get((method, path), [])
    if parameters:
        operation["parameters"] = parameters
    _errors(operation["responses"], path)
    _successes(operation["responses"], (method, path))
    bodies = operation.get("requestBody", {}).get("content", {})
    for media_type, examples in REQUESTS.get((method, path), {}).items():
        bodies[media_type]["examples"] = {
            name: {"summary": name.replace("_", " "), "value": value} for name, value in examples.items()
        }
    if (method, path) == MAKE:
        operation["callbacks"] = WEBHOOK


def _errors(responses: dict[str, Any], path: str) -> None:
    """Every error of a route in the shape of its API, with those that every route has."""
    found = responses.get("422", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if found.get("$ref", "").endswith("/HTTPValidationError"):  # FastAPI's guess for whatever has parameters
        del responses["422"]
    group = tag(path)
    if path.startswith("/v1") and group != "openai":
        for kind in _everywhere(path, "404" in responses):
            response = responses.setdefault(str(kind.status), {"description": ""})
            if f"`{kind.code}`" not in response["description"]:
                response["description"] = f"{response['description']} `{kind.code}`: {kind.__doc__}".strip()
    for status, response in responses.items():
        if status >= "400":
            response.setdefault("headers", {}).update(ERROR_HEADERS.get(status, {}))
            if group == "openai":
                response["content"] = {"application/json": {"schema": reference("OpenAIError")}}
            else:
                response["content"] = {problems.MEDIA_TYPE: _problem(response["description"], status)}


def _everywhere(path: str, found: bool) -> Iterator[type[PipelineError]]:
    """The errors that a route has because all of its kind have them; `found`: whether it tells itself of a 404."""
    yield from (KeyInvalid, HostRefused, RateLimited, InternalError)
    if not path.startswith(("/v1/models", "/v1/webhooks")):
        yield from (StoreUnavailable, StoreMisconfigured, StoreCorrupt)
    if "{" in path and not found:
        yield ImageNotFound


def _problem(description: str, status: str) -> dict[str, Any]:
    """A problem as an answer, with an example for each code that is named in its description."""
    content: dict[str, Any] = {"schema": reference("Problem")}
    named = [kind for kind in problems.leaves() if f"`{kind.code}`" in description]
    if named:
        content["examples"] = {kind.code: {"value": problem(kind, status)} for kind in named}
    return content


def _successes(responses: dict[str, Any], route: Route) -> None:
    for status, content in CONTENTS.get(route, {}).items():
        responses.setdefault(status, {}).update(content)
    if route == MAKE:
        responses["200"]["content"].update(PIXEL_CONTENT)
    for status, response in responses.items():
        headers = {**response.pop("headers", {}), **ANSWER_HEADERS.get((*route, status), {})}
        if headers:
            response["headers"] = headers
        for media_type, answer in ANSWERS.get(route, {}).get(status, {}).items():
            response["content"][media_type]["example"] = answer


def _request_schemas() -> dict[str, Any]:
    schema = Request.model_json_schema(ref_template="#/components/schemas/{model}")
    found = {**schema.pop("$defs", {}), "Request": schema}
    text = {"type": "string", "description": "an https:// or s3:// address, a data: URL, or base64"}
    return {**found, "Photo": {"anyOf": [text, found["Photo"]]}}


def _problem_schemas() -> dict[str, Any]:
    schema = problems.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), "Problem": schema}

"""What runs here: models, health, what error codes mean, and the page that shows the OpenAPI document."""

from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastapi
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from deployments import problems
from deployments.service import Service, prompt_answer
from pipeline.errors import HostRefused, StoreError, WorkerUnavailable
from pipeline.presets import Preset

# Swagger UI from a package, so that the page works without the internet and no other server learns who reads it.
ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
START = "start.js"
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>PuLID Serve</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="document"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/{START}"></script>
</body>
</html>
"""
SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#document", deepLinking: true, validatorUrl: null});\n'
# Nothing from elsewhere, and nothing to elsewhere: a key is typed into this page. Swagger UI sets styles of its own.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
POLICY += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
GUARDED = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Licence(BaseModel):
    """Under which a model may be used."""

    model_config = {"extra": "allow"}

    name: str
    commercial: bool = Field(description="whether it may be used for money")


class Model(BaseModel):
    """One of the models that make a picture."""

    role: str
    repository: str | None
    licence: Licence


class Listed(BaseModel):
    """What is served, as OpenAI's API lists it."""

    id: str
    object: str
    created: int
    owned_by: str


class Models(BaseModel):
    """The preset in service; `object` and `data` are for programs that speak OpenAI's API."""

    preset: str
    description: str
    models: list[Model]
    commercial_use: bool = Field(description="whether every licence allows it")
    object: str
    data: list[Listed]


class Health(BaseModel):
    """That pictures can be made now."""

    status: str
    replicas: dict[str, int] = Field({}, description="running replicas of each deployment")


class Code(BaseModel):
    """What an error code means, apart from any one failure."""

    code: str
    status: int
    title: str


def listing(preset: Preset) -> dict[str, Any]:
    """What GET /v1/models answers of a preset; in OpenAI's words as well."""
    return {
        "preset": preset.name,
        "description": preset.description,
        "models": [
            {"role": spec.role, "repository": spec.repository, "licence": asdict(spec.licence)} for spec in preset.specs
        ],
        "commercial_use": all(spec.licence.commercial for spec in preset.specs),
        "object": "list",
        "data": [{"id": preset.name, "object": "model", "created": 0, "owned_by": "pulid-serve"}],
    }


def router(service: Service) -> fastapi.APIRouter:
    """The routes, of which only /v1/models asks for a key."""
    routes = fastapi.APIRouter()

    @routes.get("/v1/models", response_model=Models)
    async def models() -> Response:
        """The models in use, and their licences."""
        return JSONResponse(service.models())

    @routes.get(
        "/healthz",
        response_model=Health,
        responses=problems.documented(WorkerUnavailable, *problems.leaves(StoreError)),
    )
    async def health() -> Response:
        """Whether pictures can be made now."""
        return JSONResponse(await prompt_answer(service.health(), "Ray's controller or the store"))

    unknown: dict[int | str, dict[str, Any]] = {404: {"description": "there is no such code"}}

    @routes.get("/problems/{code}", response_model=Code, responses={**problems.documented(HostRefused), **unknown})
    async def problem(code: str) -> Response:
        """What the code of an error means."""
        known = {kind.code: kind for kind in problems.leaves()}
        if code not in known:
            raise HTTPException(404)
        return JSONResponse(problems.explain(known[code]))

    @routes.get("/docs", include_in_schema=False)
    async def page() -> Response:
        """The OpenAPI document for people, to be tried out."""
        return HTMLResponse(PAGE, headers=GUARDED)

    @routes.get("/docs/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        """What the page loads."""
        if name == START:
            return Response(SCRIPT, headers=GUARDED, media_type="text/javascript")
        if name not in ASSETS:
            raise HTTPException(404)
        return FileResponse(_assets() / name, headers=GUARDED, media_type=ASSETS[name])

    return routes


def _assets() -> Path:
    return Path(str(files("fastapi_offline"))) / "static"

"""The OpenAPI document against the service that it describes: what schemathesis makes of it, and every success."""

import json
import re
import tempfile
from pathlib import Path

import httpx
import hypothesis
import pytest
import schemathesis
from jsonschema import Draft202012Validator
from schemathesis import checks

from deployments.api import create_api
from deployments.keys import fingerprint
from pipeline.request import Request
from pipeline.settings import KeySettings, Settings, WebhookSettings
from tests.fakes import A_FACE, painted
from tests.loopback import serving
from tests.service import InProcess

METHODS = ("get", "post", "delete")
PHOTO, PNG = b"a face", painted().data
SMALL = {"prompt": "portrait", "width": 256, "height": 256, "num_steps": 2, "people": [{"photos": [A_FACE]}]}
AS_DESCRIBED = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


class Small(InProcess):
    """The service in one process; whatever is asked for, it draws small pictures."""

    async def make(self, request, tenant, expires, progress=None):
        small = request.model_copy(update={"width": 256, "height": 256, "num_steps": 2})
        return await super().make(small, tenant, expires, progress)


def application(folder, **more):
    (folder / "secret").write_text("a secret of no service but these")
    settings = Settings(weights_dir=folder, webhooks=WebhookSettings(secret_file=folder / "secret"), **more)
    service = Small(settings)
    return create_api(service, settings, service.life)


with tempfile.TemporaryDirectory() as nowhere:
    SCHEMA = schemathesis.openapi.from_dict(application(Path(nowhere)).openapi())


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The service, at an address."""
    with serving(application(tmp_path_factory.mktemp("notes"))) as url:
        yield url


@SCHEMA.parametrize()
@hypothesis.settings(max_examples=15, derandomize=True, deadline=None, database=None)
def test_whatever_is_sent(case, url):
    """No request gets a 5xx, nor an answer of a status, type, header or shape that the document does not have."""
    case.call_and_validate(base_url=url, checks=AS_DESCRIBED)


class Caller:
    """Calls routes by the names that the document has for them, and holds each answer against it."""

    def __init__(self, url):
        self.url, self.called = url, set()

    def __call__(self, method, path, status=200, **values):
        case = SCHEMA[path][method].Case(**values)
        answer = case.call_and_validate(base_url=self.url, checks=AS_DESCRIBED)
        assert answer.status_code == status, answer.text
        self.called.add((method.lower(), path))
        return answer


def images(call):
    def make(status=200, **headers):
        return call("POST", "/v1/images", status, body=SMALL, media_type="application/json", headers=headers)

    one = {"image_id": make().json()["id"]}
    make(Accept="image/png")
    assert make(**{"Idempotency-Key": "one"}).json()["id"] == make(**{"Idempotency-Key": "one"}).json()["id"]
    job = {"image_id": make(202, Prefer="respond-async").json()["id"]}
    events = call("GET", "/v1/images/{image_id}/events", path_parameters=job)
    assert "event: succeeded" in events.text
    for path in (one, job):
        call("GET", "/v1/images/{image_id}", path_parameters=path)
        call("POST", "/v1/images/{image_id}/cancel", path_parameters=path)
        call("GET", "/v1/images/{image_id}/{number}", path_parameters={**path, "number": 0})
        call("DELETE", "/v1/images/{image_id}", 204, path_parameters=path)
        call("GET", "/v1/images/{image_id}", 404, path_parameters=path)


def identities(call):
    body = {"photos": [A_FACE, A_FACE], "name": "Ada"}
    call("POST", "/v1/identities", 201, body=body, media_type="application/json")
    answer = call("POST", "/v1/identities", 201, body={"photos": [PHOTO]}, media_type="multipart/form-data")
    assert len(call("GET", "/v1/identities").json()["identities"]) >= 2
    path = {"identity_id": answer.json()["id"]}
    call("GET", "/v1/identities/{identity_id}", path_parameters=path)
    call("DELETE", "/v1/identities/{identity_id}", 204, path_parameters=path)
    call("GET", "/v1/identities/{identity_id}", 404, path_parameters=path)


def openai(call):
    body = {"prompt": "portrait", "size": "256x256"}
    for asked in (body, {**body, "response_format": "url"}, {**body, "stream": True}):
        call("POST", "/v1/images/generations", body=asked, media_type="application/json")
    call("POST", "/v1/images/edits", body={**body, "image": [PHOTO]}, media_type="multipart/form-data")


def replicate(call):
    files = call("POST", "/v1/files", 201, body={"content": PNG}, media_type="multipart/form-data").json()
    path = {"file_id": files["id"]}
    call("GET", "/v1/files")
    call("GET", "/v1/files/{file_id}", path_parameters=path)
    call("DELETE", "/v1/files/{file_id}", 204, path_parameters=path)
    body = {"version": "pulid-serve/flux-pulid", "input": {"prompt": "portrait", "width": 256, "height": 256}}
    call("POST", "/v1/predictions", 201, body=body, media_type="application/json")
    model = {"owner": "pulid-serve", "name": "flux-pulid"}
    made = call(
        "POST",
        "/v1/models/{owner}/{name}/predictions",
        201,
        body={"input": body["input"]},
        media_type="application/json",
        path_parameters=model,
        headers={"Prefer": "wait=30"},
    )
    path = {"prediction_id": made.json()["id"]}
    call("GET", "/v1/predictions/{prediction_id}", path_parameters=path)
    call("POST", "/v1/predictions/{prediction_id}/cancel", path_parameters=path)
    call("GET", "/v1/predictions/{prediction_id}/stream", path_parameters=path)
    call("GET", "/v1/predictions/{prediction_id}/output/{name}", path_parameters={**path, "name": "0.webp"})
    call("GET", "/v1/models/{owner}/{name}", path_parameters=model)
    call("GET", "/v1/models/{owner}/{name}/versions", path_parameters=model)
    call("GET", "/v1/models/{owner}/{name}/versions/{version_id}", path_parameters={**model, "version_id": "hidden"})
    call("GET", "/v1/webhooks/default/secret")


def operations(document):
    return {(method, path) for path, entry in document["paths"].items() for method in METHODS if method in entry}


def test_every_success_is_as_described(url):
    """Each route in the document is called as it is meant to be, and answers what stands there."""
    call = Caller(url)
    for group in (images, identities, openai, replicate):
        group(call)
    call("GET", "/v1/models")
    call("GET", "/healthz")
    call("GET", "/problems/{code}", path_parameters={"code": "no_face"})
    assert call.called == operations(SCHEMA.raw_schema)


def test_without_a_key_every_route_says_so(tmp_path):
    """Where there are keys the document asks for one wherever the service does, and has the answer without."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"tenant": "acme", "sha256": fingerprint("pulid_" + "k" * 43)}]))
    app = application(tmp_path, keys=KeySettings(file=keys))
    paths = app.openapi()["paths"]
    with serving(app) as url:
        call = Caller(url)
        for method, path in operations(SCHEMA.raw_schema):
            assert paths[path][method].get("security") == ([{"key": []}] if path.startswith("/v1") else None)
            if path.startswith("/v1"):
                call(method.upper(), path, 401, path_parameters=dict.fromkeys(re.findall(r"{(\w+)}", path), "0" * 32))


def examples(document):
    """Every example in the document, with its schema; a stream's is of each event alone."""
    for path, entry in document["paths"].items():
        for method in METHODS:
            operation = entry.get(method, {})
            parts = {"request": operation.get("requestBody", {}), **operation.get("responses", {})}
            for name, part in parts.items():
                for kind, content in part.get("content", {}).items():
                    if kind == "text/event-stream":
                        continue
                    found = [example["value"] for example in content.get("examples", {}).values()]
                    for value in found + ([content["example"]] if "example" in content else []):
                        yield f"{method} {path} {name} {kind}", content["schema"], value


def test_every_example_is_one():
    """Examples of requests, answers and errors fit the schemas beside which they stand."""
    document = SCHEMA.raw_schema
    found = list(examples(document))
    assert len(found) > 100
    for where, schema, value in found:
        wrong = list(Draft202012Validator({**schema, "components": document["components"]}).iter_errors(value))
        assert not wrong, (where, wrong)
    body = document["paths"]["/v1/images"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        assert Request.model_validate(example["value"])


def test_generated_clients_have_names():
    """The document is valid OpenAPI, every operation has a name of its own, a group and a sentence."""
    SCHEMA.validate()
    document = SCHEMA.raw_schema
    every = [document["paths"][path][method] for method, path in operations(document)]
    assert len({operation["operationId"] for operation in every}) == len(every)
    assert {operation["tags"][0] for operation in every} == {tag["name"] for tag in document["tags"]}
    assert all(operation["description"] for operation in every)


def test_the_page_needs_nothing_from_elsewhere(url):
    """/docs names only what this service serves, and forbids the browser all else."""
    with httpx.Client(base_url=url, trust_env=False) as client:
        page = client.get("/docs")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        found = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text)
        assert len(found) == 3
        for address in found:
            part = client.get(f"/{address}")
            assert part.status_code == 200, address
            assert re.match("text/(css|javascript)", part.headers["content-type"])

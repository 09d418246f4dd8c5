"""The application on a real Ray cluster of two nodes, with fake stages: what no single process can show."""

import asyncio
import json
import os
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from ray import serve

from deployments.app import Parts, wire
from pipeline import flow
from pipeline.events import Queued
from pipeline.request import Request
from pipeline.settings import EngineSettings, LimitSettings, Settings, StoreSettings
from tests.fakes import (
    A_FACE,
    CRASH,
    ENDLESS,
    NO_FACE,
    POISON,
    FakeDenoise,
    FakeFaces,
    FakeIdentity,
    FakeText,
    fake_models,
    memory_store,
    noted_objects,
    notes,
)

pytestmark = pytest.mark.cluster
CONFIG = Path(__file__).parent.parent / "serve_config.yaml"
FAKES = Parts(FakeFaces, FakeIdentity, FakeText, FakeDenoise, noted_objects, fake_models)
STAGES = {"FaceDetector": "FakeFaces", "IdentityEncoder": "FakeIdentity", "TextEncoder": "FakeText"}
STAGES |= {"FluxDenoiser": "FakeDenoise"}


def placed(**more):
    """The options of serve_config.yaml itself, with fewer CPUs and one replica each."""
    options = {}
    for deployment in yaml.safe_load(CONFIG.read_text())["applications"][0]["deployments"]:
        name = deployment.pop("name")
        deployment["ray_actor_options"]["num_cpus"] = 0.5
        if "autoscaling_config" in deployment:
            deployment["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
        options[name] = {**deployment, **more.get(name, {})}
    return options


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    return Settings(
        weights_dir=folder,
        store=StoreSettings(url=f"file://{folder}/pictures"),
        limits=LimitSettings(max_body_bytes=2_000_000, request_seconds=8, retry_after_seconds=7),
        engine=EngineSettings(max_jobs=3),
    )


@pytest.fixture(scope="module")
def url(ray_cluster, settings):
    """The application, running; requests go to this address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(wire(settings, FAKES, placed(FluxDenoiser={"max_queued_requests": 2})), name="pulid")
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def body(prompt="portrait", photo=A_FACE, **fields):
    people = [{"photos": [photo]}] if photo else []
    return {"prompt": prompt, "width": 256, "height": 256, "seed": 7, "people": people, **fields}


def assert_problem(response, status, code):
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert response.json()["code"] == code
    return response.json()


def endless(url, seed, **options):
    """A request that is never finished, in flight; to be awaited or cancelled."""
    client = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)

    async def go():
        async with client:
            return await client.post("/v1/images", json=body(ENDLESS, photo=None, seed=seed), **options)

    return asyncio.ensure_future(go())


async def until(condition, seconds=20):
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


def test_the_cluster_gives_the_pixels_of_one_process(client, settings, tmp_path):
    """The same request gives the same pixels, served over HTTP, as generate() in this process."""
    wanted = body(num_outputs=2, true_cfg=2.0)
    response = client.post("/v1/images", json=wanted)
    assert response.status_code == 200, response.text
    here = Settings(weights_dir=tmp_path)
    stages = flow.Stages(
        faces=FakeFaces(here).detect,
        identity=FakeIdentity(here).encode,
        text=FakeText(here).encode,
        denoise=FakeDenoise(here).denoise,
    )
    store = memory_store()
    stored = flow.generate(Request.model_validate(wanted), stages, store)
    for number, image in enumerate(response.json()["images"]):
        assert client.get(image["url"]).content == store.content(stored.id, number).data


def test_each_deployment_sits_on_its_node(client, settings, ray_cluster):
    """FaceDetector and Ingress run on the CPU node, the other stages on the GPU node, each in its own process."""
    loaded = [note.split("-") for note in notes(settings.weights_dir, "loaded")]
    nodes = {kind: node for kind, _, node in loaded}
    pools = {kind: "cpu" if kind in ("FakeFaces", "Ingress") else "gpu" for kind in (*STAGES.values(), "Ingress")}
    assert nodes == {kind: ray_cluster[pool] for kind, pool in pools.items()}
    assert len({pid for _, pid, _ in loaded}) == 5


def test_payloads_do_not_pass_through_the_ingress(client, settings):
    """Faces are unpickled by the IdentityEncoder only, Identity and Text by the FluxDenoiser, as read-only arrays."""
    assert client.post("/v1/images", json=body()).status_code == 200
    pids = {kind: pid for kind, pid, _ in (note.split("-") for note in notes(settings.weights_dir, "loaded"))}
    assert notes(settings.weights_dir, "unpickled", "NotedFaces") == {pids["FakeIdentity"]}
    assert notes(settings.weights_dir, "unpickled", "NotedIdentity") == {pids["FakeDenoise"]}
    assert notes(settings.weights_dir, "unpickled", "NotedText") == {pids["FakeDenoise"]}
    assert notes(settings.weights_dir, "read_only") == {"tokens"}


def test_typed_errors_cross_the_replicas(client):
    """A stage's error reaches the caller as it was raised, however many replicas lie between."""
    problem = assert_problem(client.post("/v1/images", json=body(photo=NO_FACE)), 422, "no_face")
    assert problem["detail"] == "people[0].photos[0] shows no face."
    two = body(people=[{"photos": [A_FACE]}, {"photos": [A_FACE, NO_FACE]}], num_outputs=2)
    problem = assert_problem(client.post("/v1/images", json=two), 422, "no_face")
    assert problem["detail"] == "people[1].photos[1] shows no face."
    assert_problem(client.post("/v1/images", json=body(photo=POISON)), 500, "internal_error")


def test_a_bug_in_a_stage_leaks_nothing(client):
    """Neither the words of an unforeseen error nor a remote traceback reach the caller; no log holds the prompt."""
    response = client.post("/v1/images", json=body(CRASH))
    assert_problem(response, 500, "internal_error")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    logs = [path for path in Path(os.environ["RAY_TMPDIR"]).rglob("*") if path.suffix in (".log", ".out", ".err")]
    assert any(b"ZeroDivisionError" in path.read_bytes() for path in logs), "the failure was not logged"
    assert not any(b"my secret" in path.read_bytes() for path in logs)


def test_what_the_caches_do_is_found_among_rays_metrics(client, settings):
    """A prompt that was read before is a hit of the text cache, at the address that Prometheus reads."""
    for _ in range(2):
        assert client.post("/v1/images", json=body("twice")).status_code == 200
    addresses = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]

    def told(kind):
        lines = "".join(httpx.get(address, trust_env=False).text for address in addresses).splitlines()
        names = (f"ray_pulid_cache_{kind}_total{{", 'cache="text"', 'deployment="TextEncoder"', 'application="pulid"')
        return [float(line.split()[-1]) for line in lines if all(name in line for name in names)]

    asyncio.run(until(lambda: told("hits") and told("misses")))
    assert min(*told("hits"), *told("misses")) >= 1


def test_a_large_body_is_refused_over_a_real_connection(client):
    """A chunked body beyond the limit gets its 413."""
    chunks = (b" " * 100_000 for _ in range(50))
    headers = {"content-type": "application/json"}
    assert_problem(client.post("/v1/images", content=chunks, headers=headers), 413, "body_too_large")


def test_health_names_the_running_replicas(client):
    """GET /healthz is 200 with all six deployments running."""
    response = client.get("/healthz")
    assert response.json() == {"status": "ok", "replicas": dict.fromkeys([*STAGES, "Ingress", "Board"], 1)}


def test_a_client_that_goes_away_stops_the_loop(url, client, settings):
    """The loop ends with the step that runs when the client disconnects, and the denoiser is free again."""

    async def go():
        request = endless(url, 11)
        await until(lambda: notes(settings.weights_dir, "step", "11"))
        request.cancel()
        await until(lambda: notes(settings.weights_dir, "stopped", "11"))

    asyncio.run(go())
    assert client.post("/v1/images", json=body()).status_code == 200


def test_cancelling_a_stream_frees_its_row(url, settings, tmp_path):
    """A watched picture leaves the engine when its stream is cancelled, whether it is being drawn or waits for that."""
    denoiser = serve.get_deployment_handle("FluxDenoiser", "pulid")
    prompt = FakeText(Settings(weights_dir=tmp_path)).encode("p", 128)

    def watch(seed):
        wanted = Request.model_validate(body(ENDLESS, photo=None, seed=seed))
        stream = denoiser.options(stream=True).watch.remote(wanted, 0, prompt, None)
        assert next(iter(stream)) == Queued(seed - 31)
        return stream

    drawn, waiting, last = map(watch, (31, 32, 33))
    waiting.cancel()
    drawn.cancel()
    asyncio.run(until(lambda: notes(settings.weights_dir, "stopped", "31")))
    asyncio.run(until(lambda: notes(settings.weights_dir, "step", "33")))  # it came after the one that waited
    last.cancel()
    asyncio.run(until(lambda: notes(settings.weights_dir, "stopped", "33")))
    assert not notes(settings.weights_dir, "step", "32")


def test_the_deadline_stops_the_loop(url, settings):
    """After request_seconds the caller gets a 504 and the loop ends, even if the caller asks for no timeout."""

    async def go():
        response = await endless(url, 12, headers={"x-request-timeout-seconds": "-1"})
        await until(lambda: notes(settings.weights_dir, "stopped", "12"))
        return response

    assert_problem(asyncio.run(go()), 504, "deadline_exceeded")


def test_a_full_queue_is_a_429_that_says_when_to_come_back(url, client, settings):
    """When the denoiser's queue is full a request is refused with Retry-After; afterwards all is as before."""

    async def go():
        waiting, refused = set(), None
        for seed in range(20, 30):
            waiting.add(endless(url, seed))
            done, waiting = await asyncio.wait(waiting, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            if done:
                refused = done.pop().result()
                break
        for request in waiting:
            request.cancel()
        await until(lambda: notes(settings.weights_dir, "stopped", "20"))
        return refused, len(waiting)

    refused, waiting = asyncio.run(go())
    assert_problem(refused, 429, "overloaded")
    assert refused.headers["retry-after"] == "7"
    assert waiting >= 4  # three in the engine, and at least one in the queue
    assert client.post("/v1/images", json=body()).status_code == 200


def test_a_replica_killed_in_the_middle_is_told_and_replaced(url, client, settings):
    """Its request gets a 503 problem at once; Serve starts another replica, and the next request succeeds."""

    def denoisers():
        return {note.split("-")[0] for note in notes(settings.weights_dir, "loaded", "FakeDenoise")}

    (before,) = denoisers()

    async def go():
        request = endless(url, 13)
        await until(lambda: notes(settings.weights_dir, "step", "13"))
        os.kill(int(before), signal.SIGKILL)
        response = await request
        await until(lambda: denoisers() != {before}, seconds=60)
        return response

    response = asyncio.run(go())
    assert_problem(response, 503, "worker_unavailable")
    assert "retry-after" in response.headers
    again = client.post("/v1/images", json=body())
    assert again.status_code == 200, json.dumps(again.json())

"""The real stages of the miniature, three ways: in one process, in Serve's local testing mode, on a two-node cluster.

The cluster's pictures go to an S3 server over HTTP, behind a proxy that can fail.
"""

import base64
import hashlib
import io
import json
import os
import socket
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from ray import serve
from skimage import data

from deployments.app import AppArgs, build, wire
from deployments.keys import fingerprint, new_key
from pipeline import flow
from pipeline.request import Request
from pipeline.settings import JobSettings, KeySettings, Settings
from pipeline.store import open_store
from tests import s3
from tests.test_cluster import placed

pytestmark = pytest.mark.cluster
SMALL = {"width": 256, "height": 256, "num_steps": 2, "seed": 7}


def astronaut(mirrored: bool = False) -> str:
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()[:, :: -1 if mirrored else 1]).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PEOPLE = [
    {"photos": [astronaut()], "mask": {"box": [0, 0, 0.5, 1]}},
    {"photos": [astronaut(), astronaut(mirrored=True)], "fusion": "concat", "start_step": 1, "id_weight": 0.8},
]
BODIES = {
    "one person": {"prompt": "portrait", "people": PEOPLE[:1], **SMALL},
    "nobody": {"prompt": "portrait", **SMALL},
    "nobody by weight": {"prompt": "portrait", "people": [{**PEOPLE[0], "id_weight": 0.0}], **SMALL},
    "everything": {
        **{"prompt": "two people", "negative_prompt": "blurry", "people": PEOPLE, **SMALL},
        **{"true_cfg": 3.0, "num_outputs": 2, "output_format": "webp", "max_sequence_length": 256},
    },
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """To the bit only with one row a pass: where rows share one, its last bits depend on the others."""
    folder = tmp_path_factory.mktemp("same-pixels")
    return Settings.from_environment({}, device="cpu", store__url=f"file://{folder}", engine__max_rows=1)


@pytest.fixture(scope="module")
def expected(settings):
    """The hashes of the pictures of each body, made in this process, with one thread as Ray gives its replicas."""
    torch.set_num_threads(1)
    stages, store = flow.load_stages(settings), open_store(settings.store)
    made = {name: flow.generate(Request.model_validate(body), stages, store) for name, body in BODIES.items()}
    return {name: [picture["sha256"] for picture in stored.record["pictures"]] for name, stored in made.items()}


def test_weight_zero_is_the_bytes_of_nobody(expected):
    """id_weight 0 gives the bytes of a request without people; a person gives others."""
    assert expected["nobody by weight"] == expected["nobody"]
    assert expected["one person"] != expected["nobody"]
    assert len(set(expected["everything"])) == 2


def test_local_testing_mode(settings, expected):
    """build() without a cluster gives the same pixels."""
    handle = serve.run(build(AppArgs.model_validate(settings.model_dump())), name="local", _local_testing_mode=True)
    for name, body in BODIES.items():
        stored = handle.generate.remote(Request.model_validate(body)).result(timeout_s=60)
        assert [picture["sha256"] for picture in stored.record["pictures"]] == expected[name], name


@pytest.fixture(scope="module")
def bucket():
    """An S3 server and a proxy before it; credentials are in the environment before the cluster's nodes start."""
    before = {name: os.environ.get(name) for name in s3.CREDENTIALS}
    os.environ.update(s3.CREDENTIALS)
    with s3.s3_server() as endpoint, s3.failing(endpoint) as proxy:
        yield proxy
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def client(settings, bucket, ray_cluster, tmp_path_factory):
    """The application on two nodes, placed by label as in serve_config.yaml, storing to S3."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, keys = new_key(), tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps([{"tenant": "acme", "sha256": fingerprint(key)}]))
    stored_in_s3 = settings.model_copy(
        update={
            "store": s3.s3_settings(bucket.endpoint, path_style=True),
            "keys": KeySettings(file=keys),
            "jobs": JobSettings(scan_seconds=3600),  # the faults of a test are for its own calls
        }
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(wire(stored_in_s3, overrides=placed()), name="pulid")
    options = {"headers": {"Authorization": f"Bearer {key}"}, "timeout": 120, "trust_env": False}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", **options) as client:
        yield client


@pytest.mark.parametrize("name", BODIES)
def test_two_node_cluster_and_s3(client, expected, name):
    """Over HTTP, four replicas on two nodes and S3 the same pixels come out of the presigned link."""
    answer = client.post("/v1/images", json=BODIES[name])
    assert answer.status_code == 200, answer.text
    for image, digest in zip(answer.json()["images"], expected[name], strict=True):
        redirect = client.get(image["url"])
        assert redirect.status_code == 307
        pixels = httpx.get(redirect.headers["location"], trust_env=False).raise_for_status().content
        assert hashlib.sha256(pixels).hexdigest() == digest
    record = client.get(answer.json()["record"]).json()
    assert record["models"]["pulid/pulid_flux_miniature.safetensors"]
    assert astronaut()[:100] not in str(record)


def test_a_read_only_photo_array_is_no_obstacle(client):
    """Arrays that arrive as shared read-only memory are copied before they are worked on; a second request is as good
    as the first.
    """
    first, second = (client.post("/v1/images", json=BODIES["everything"]) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json()["faces"] == second.json()["faces"]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (s3.refuses(400, "ExpiredToken"), "store_misconfigured"),
        (s3.refuses(404, "NoSuchBucket"), "store_misconfigured"),
        (s3.refuses(403, "AccessDenied"), "store_misconfigured"),
        (s3.slow_down, "store_unavailable"),
        (s3.hangs_up, "store_unavailable"),
    ],
    ids=["expired", "no bucket", "denied", "overloaded", "down"],
)
def test_a_store_that_refuses(client, bucket, fault, code):
    """Expired credentials, a missing bucket, an overloaded server and one that is down are a 5xx with an id; afterwards
    all is as before.
    """
    bucket.faults.extend([fault] * 2)
    answer = client.post("/v1/images", json=BODIES["nobody"])
    assert (answer.status_code, answer.json()["code"]) == (503 if code == "store_unavailable" else 500, code)
    assert answer.json()["instance"] in answer.json()["detail"]
    bucket.faults.clear()
    assert client.post("/v1/images", json=BODIES["nobody"]).status_code == 200


def test_the_expected_pictures_are_pictures(expected, settings):
    """What is compared has contrast, and is not one colour."""
    paths = list(Path(settings.store.url.removeprefix("file://")).rglob("0.png"))
    assert paths
    assert all(np.asarray(Image.open(path)).std() > 10 for path in paths)

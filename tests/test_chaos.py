"""Everything that can be killed is killed in the middle of its work, on a local Ray cluster, over HTTP.

After each of these nothing that was accepted is lost, and nothing is in the store twice.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from ray import serve

from bench.soak_service import alive, megabytes, replicas
from cluster.local import free_port
from pipeline.settings import StoreSettings
from tests import s3
from tests.chaos import (
    KEYS,
    RUNNING,
    SLOW,
    STAGES,
    Away,
    House,
    body,
    events,
    held,
    pids,
    prepare_death,
    settings,
    until,
)
from tests.fakes import ENDLESS, notes

pytestmark = pytest.mark.cluster
AWAY_SECONDS = 4.0  # longer than a lease
ROOMY = 15  # MB by which a process may grow from one burst to the next


@pytest.fixture(scope="module")
def port(ray_here):
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    return port


@pytest.fixture(scope="module")
def house(port, tmp_path_factory):
    """The application over a folder."""
    folder = tmp_path_factory.mktemp("chaos")
    house = House(settings(folder, StoreSettings(url=f"file://{folder}/pictures")), port)
    with house.client:
        house.deploy()
        yield house


# --- who is killed


def test_stages_that_are_killed_cost_no_job(house):
    """Every stage dies with a job's call in it: the jobs go on with the next replicas, in the same attempt."""
    jobs, victims = [], []
    with ExitStack() as holds:
        for kind in reversed(STAGES):  # the last one first, or no job would come so far
            holds.enter_context(held(house.folder, kind))
            jobs.append(house.job(kind, num_outputs=2))
            (pid,) = until(lambda kind=kind: notes(house.folder, "held", kind))
            victims.append(int(pid))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
    for job_id in jobs:
        view = house.succeeded(job_id)
        assert (view["attempt"], len(view["images"])) == (1, 2)


def test_an_ingress_that_is_killed_costs_no_job(house):
    """Its jobs are taken over when their lease is out, and end in their second attempt."""
    job_ids = [house.job(SLOW, num_steps=28) for _ in range(2)]
    owners = [house.runs(job_id) for job_id in job_ids]
    os.kill(owners[0], signal.SIGKILL)
    for job_id, owner in zip(job_ids, owners, strict=True):
        assert house.succeeded(job_id)["attempt"] == (2 if owner == owners[0] else 1)


@pytest.mark.parametrize("kills", [False, True], ids=["board lives", "board dies"])
def test_every_step_is_seen_over_a_reconnect(house, kills):
    """Who comes back half-way sees the other steps of a 28-step job, in order and once.

    Where the board was lost meanwhile, none comes twice or out of order, and the end is told all the same.
    """
    job_id = house.job(SLOW, num_steps=28)
    seen = list(events(house, job_id, "", until_step=14))
    if kills:
        (pid,) = pids("Board")
        os.kill(pid, signal.SIGKILL)
    while seen[-1][1] != "succeeded":
        seen += events(house, job_id, seen[-1][0])
    steps = [data["step"] for _, name, data in seen if name == "step"]
    assert steps[:14] == list(range(1, 15))
    assert steps == (sorted(set(steps)) if kills else list(range(1, 29)))
    assert [name for _, name, _ in seen if name != "step"][:2] == ["queued", "started"]
    house.succeeded(job_id)


@pytest.mark.parametrize(
    ("moment", "pattern", "attempt"),
    [
        ("before", r"create images/.*/1\.json", 2),  # between the picture and its record
        ("after", r"create images/.*/1\.json", 1),
        ("after", r"succeeded jobs/.*", 1),
        ("after", r"create images/.*/record\.json", 1),  # between the record and the answer
    ],
)
def test_a_death_between_two_writes_leaves_one_image(house, moment, pattern, attempt):
    """Whoever dies between any two writes: the caller who sends its request again gets the one picture there is."""
    prepare_death(house.folder, moment, pattern)
    key = f"{moment} {pattern}"
    answer = house.submit(key=key, prefer=None).json()
    until(lambda: not Path(house.folder, "die").exists())
    view = house.succeeded(answer["id"])
    assert [picture["file"] for picture in view["pictures"]] == [f"{attempt}-0.png"]
    again = house.submit(key=key, prefer=None)
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (answer["id"], "true")


def test_a_zombie_writes_nothing(house):
    """An ingress that is stopped for longer than its lease, and then goes on, finds its job done by another."""
    job_id = house.job(SLOW, num_steps=28)
    pid = house.runs(job_id)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert house.runs(job_id, 2) != pid
        until(lambda: house.objects.get(f"images/{job_id}/record.json"))
    finally:
        os.kill(pid, signal.SIGCONT)
    view = house.succeeded(job_id)
    assert [picture["file"] for picture in view["pictures"]] == ["2-0.png"]
    assert alive(pid)


# --- many at once


def test_equal_requests_at_once_are_one_job(house):
    """Eight callers with one Idempotency-Key: one picture, of which all of them are told."""
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda _: house.submit(key="the same", prefer=None).json(), range(8)))
    assert len({answer["id"] for answer in answers}) == 1
    house.succeeded(answers[0]["id"])


def test_a_burst_is_queued_and_leaves_no_trace(house):
    """Ten times what can be run at once is accepted and done, of both tenants; no process keeps anything of it."""

    def burst():
        tenants = list(KEYS) * (10 * RUNNING)
        with ThreadPoolExecutor(32) as callers:
            jobs = list(callers.map(lambda tenant: (house.job(tenant=tenant), tenant), tenants))
            views = list(callers.map(lambda job: house.ended(*job), jobs))
        assert {view["status"] for view in views} == {"succeeded"}
        house.sound()
        house.idle()
        return jobs, {replica: megabytes(replica.pid) for replica in replicas()}

    jobs, before = burst()
    _, after = burst()
    grown = {(replica.kind, replica.pid): after[replica] - before[replica] for replica in before}
    assert max(grown.values()) < ROOMY, grown
    for job_id, tenant in jobs[:4]:
        other = next(name for name in KEYS if name != tenant)
        assert house.insist("GET", f"/v1/images/{job_id}", other).status_code == 404
        assert house.insist("POST", f"/v1/images/{job_id}/cancel", other).status_code == 404


def test_more_callers_than_places_are_told_to_come_back(house):
    """Of ten times the callers that may wait, some are answered and the others get a 429 with Retry-After."""
    most = 2 * house.settings.limits.max_requests

    def call(_):
        return house.send("POST", "/v1/images", json=body("waits"))

    with ThreadPoolExecutor(128) as callers:
        answers = list(callers.map(call, range(10 * most)))
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 429}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    house.accepted.update({answer.json()["id"]: "acme" for answer in answers if answer.status_code == 200})


def test_a_cancelled_job_frees_its_row_within_one_step(house):
    """The engine drops the picture at the step after the one in which it was told, and no call stays open."""
    job_id = house.job(ENDLESS, seed=77)
    until(lambda: notes(house.folder, "step", "77"))
    assert house.insist("POST", f"/v1/images/{job_id}/cancel").json()["status"] == "cancelled"
    (stopped,) = until(lambda: notes(house.folder, "stopped", "77"))
    (told,) = notes(house.folder, "told", "77")
    assert 0 <= int(stopped) - int(told.split("-")[1]) <= 1
    house.sound()
    house.idle()


# --- all of it, and the store


def test_a_full_restart_goes_on_with_everything(house, port):
    """Everything is killed with jobs queued and running; the next service over the same store ends each once."""
    job_ids = [house.job(SLOW, num_steps=28) for _ in range(2 * RUNNING + 4)]
    house.runs(job_ids[0])
    assert {house.view(job_id)["status"] for job_id in job_ids} == {"queued", "running"}
    for replica in sorted(replicas(), key=lambda replica: replica.kind != "Ingress"):
        os.kill(replica.pid, signal.SIGKILL)
    serve.shutdown()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    house.deploy()
    for job_id in job_ids:
        assert house.ended(job_id)["status"] == "succeeded"
    house.sound()
    house.idle()


@pytest.fixture(scope="module")
def far(port, tmp_path_factory):
    """The application over S3, and the server's absence."""
    away = Away()
    with (
        pytest.MonkeyPatch.context() as environment,
        s3.s3_server() as server,
        s3.failing(server, otherwise=away) as proxy,
    ):
        for name, value in s3.CREDENTIALS.items():
            environment.setenv(name, value)
        house = House(settings(tmp_path_factory.mktemp("far"), s3.s3_settings(proxy.endpoint)), port)
        serve.delete("pulid")
        with house.client:
            house.deploy(ray_actor_options={"num_cpus": 0.2, "runtime_env": {"env_vars": s3.CREDENTIALS}})
            yield house, away
        serve.delete("pulid")  # or it would look for jobs in a store that is gone


def test_a_store_that_is_away_at_submit_accepts_nothing(far):
    """The caller is told, and the same request under the same key is carried out once the store is back."""
    house, away = far
    away.gone.set()
    headers = {"idempotency-key": "again", "prefer": "respond-async"}
    answer = house.send("POST", "/v1/images", headers=headers, json=body("portrait"))
    away.gone.clear()
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert house.succeeded(house.job(key="again"))["attempt"] == 1


def test_a_store_that_is_away_at_the_commit_loses_nothing(far):
    """Pictures that are done wait for the store, for longer than a lease, and are not made again."""
    house, away = far
    with held(house.folder, "FluxDenoiser"):
        job_id = house.job()
        until(lambda: notes(house.folder, "held", "FluxDenoiser"))
        away.gone.set()
    left = time.monotonic()
    until(lambda: any(method == "PUT" and path.endswith(".png") for method, path in away.refused))
    until(lambda: time.monotonic() > left + AWAY_SECONDS)
    away.gone.clear()
    assert house.succeeded(job_id)["attempt"] == 1


def test_a_store_that_is_away_at_read_is_told(far):
    """A 503 for the job and for its pixels, and all is there afterwards."""
    house, away = far
    job_id = house.job()
    house.succeeded(job_id)
    addresses = [f"/v1/images/{job_id}", f"/v1/images/{job_id}/0", f"/v1/images/{job_id}/events"]
    away.gone.set()
    answers = [house.send("GET", address) for address in addresses]
    away.gone.clear()
    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, "store_unavailable")}
    assert {house.send("GET", address).status_code for address in addresses} <= {200, 307}
    house.idle()

"""The soak's own eyes: a store in which something is wrong is never called sound."""

import pytest

from bench.soak_service import audit
from pipeline.job_store import JobStore
from pipeline.objects_memory import MemoryObjects
from pipeline.request import Request
from pipeline.settings import JobSettings
from pipeline.store import ImageStore
from tests.fakes import A_FACE, painted


@pytest.fixture
def done():
    """A store with one job that has ended well, and its id."""
    objects = MemoryObjects()
    images = ImageStore(objects)
    jobs = JobStore(objects, images, JobSettings())
    request = Request(prompt="p", width=256, height=256, people=[{"photos": [A_FACE]}])
    job_id, _ = jobs.submit(request, "acme")
    held = jobs.claim(jobs.read("acme", job_id), "owner")
    images.publish(job_id, request, [painted()], "acme", 1)
    held = jobs.change(held, state="succeeded")
    jobs.settle(held.job)
    jobs.forget(held)
    return objects, job_id


def test_what_ended_once_is_sound(done):
    """One record, its pictures, and nothing else."""
    objects, job_id = done
    assert audit(objects, {job_id: "acme"}).clean


@pytest.mark.parametrize("name", ["record.json", "1-0.png"])
def test_what_is_gone_is_lost(done, name):
    """A job without its record, or a record without its picture."""
    objects, job_id = done
    objects.delete(f"images/{job_id}/{name}")
    assert audit(objects, {job_id: "acme"}).lost == [job_id]


def test_a_job_of_somebody_else_is_lost(done):
    """A record of another tenant's is not the one that was accepted."""
    objects, job_id = done
    assert audit(objects, {job_id: "globex"}).lost == [job_id]


def test_a_second_picture_is_seen(done):
    """What another attempt has left."""
    objects, job_id = done
    objects.create(f"images/{job_id}/2-0.png", b"again")
    assert audit(objects, {job_id: "acme"}).doubled == [job_id]


@pytest.mark.parametrize("prefix", ["jobs/acme/", "requests/"])
def test_what_nobody_ended_is_seen(done, prefix):
    """An open job, or a request that kept its photos."""
    objects, job_id = done
    objects.create(f"{prefix}{job_id}.json", b"{}")
    assert audit(objects, {job_id: "acme"}).stray == [f"{prefix}{job_id}.json"]


def test_an_image_that_nobody_asked_for_is_seen(done):
    """A job that was carried out though its caller knows nothing of it."""
    objects, job_id = done
    assert audit(objects, {}).stray == [f"images/{job_id}"]

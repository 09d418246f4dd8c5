import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import IdempotencyConflict, ImageNotFound, StoreConflict, StoreCorrupt
from pipeline.job_store import STRAY_SECONDS, JobStore
from pipeline.jobs import Hook, Job, begun, in_turn, named, new_id
from pipeline.objects_local import LocalObjects
from pipeline.request import Request
from pipeline.settings import JobSettings
from pipeline.store import ImageStore
from tests.fakes import A_FACE, painted

SETTINGS = JobSettings()


class Clock:
    """Seconds since 1970 that a test moves on."""

    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def objects(tmp_path):
    return LocalObjects(tmp_path)


@pytest.fixture
def images(objects):
    return ImageStore(objects)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def jobs(objects, images, clock):
    return JobStore(objects, images, SETTINGS, clock)


def request(prompt="portrait", **fields):
    return Request(prompt=prompt, width=256, height=256, people=[{"photos": [A_FACE]}], **fields)


def keys(objects, prefix=""):
    return [entry.key for entry in objects.list(prefix)]


def done(jobs, images, held, attempt=None):
    """Publish-then-commit, as a worker does."""
    images.publish(held.job.id, request(), [painted()], held.job.tenant, attempt or held.job.attempt)
    return jobs.change(held, state="succeeded")


# --- accepting


def test_a_job_is_in_the_store_before_it_is_accepted(jobs):
    """Whoever has the store has everything that is needed to go on with a job: the request too, with its photos."""
    job_id, job = jobs.submit(request(seed=7), "acme")
    held = jobs.read("acme", job_id)
    assert held.job == job
    assert held.job.state == "queued"
    assert jobs.request(held.job) == request(seed=7)


def test_a_seed_is_drawn_once(jobs):
    """Every attempt at a job draws the same picture."""
    job_id, _ = jobs.submit(request(), "")
    seeds = {jobs.request(jobs.read("", job_id).job).seed for _ in range(2)}
    assert len(seeds) == 1
    assert None not in seeds


def test_another_tenants_job_is_not_there(jobs):
    """An id of somebody else answers as one that does not exist."""
    job_id, _ = jobs.submit(request(), "acme")
    assert jobs.read("other", job_id) is None
    with pytest.raises(ImageNotFound):
        jobs.record("other", job_id)


def test_a_key_is_carried_out_once(jobs, objects):
    """Sixteen equal requests under one Idempotency-Key at once are one job."""
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: jobs.submit(request(), "acme", "one"), range(16)))
    assert len({job_id for job_id, _ in answers}) == 1
    assert sum(job is not None for _, job in answers) == 1
    assert len(keys(objects, "jobs/")) == 1


def test_a_key_belongs_to_its_tenant_and_its_request(jobs):
    """A key of another tenant is another key; the same key with another request is refused."""
    first, _ = jobs.submit(request(), "acme", "one")
    other, job = jobs.submit(request(), "other", "one")
    assert other == job.id != first
    with pytest.raises(IdempotencyConflict):
        jobs.submit(request(prompt="another"), "acme", "one")


def test_a_key_is_forgotten_after_its_time(jobs, clock):
    """Later the same key begins a new job."""
    first, _ = jobs.submit(request(), "", "one")
    clock.now += SETTINGS.replay_seconds + 1
    second, job = jobs.submit(request(), "", "one")
    assert second == job.id != first


@pytest.mark.parametrize("left", ["", "requests/"])
def test_a_submit_that_was_broken_off_is_completed_by_the_next(jobs, objects, left):
    """Whoever was killed between two writes, the next equal request under the key becomes a whole job."""
    job_id, _ = jobs.submit(request(), "", "one")
    for prefix in {"jobs/", "requests/"} - {left}:
        for key in keys(objects, prefix):
            objects.delete(key)
    again, _ = jobs.submit(request(), "", "one")
    assert again == job_id
    assert jobs.request(jobs.read("", job_id).job) is not None


def test_an_id_tells_when_it_was_made():
    """Ids sort by their time, so that a listing is a queue."""
    ids = [new_id() for _ in range(50)]
    assert [begun(one) for one in ids] == sorted(begun(one) for one in ids)
    assert len(set(ids)) == 50


# --- leases


def test_one_of_many_claims_wins(jobs):
    """Sixteen replicas that see one queued job: one of them runs it."""
    job_id, _ = jobs.submit(request(), "")
    held = jobs.read("", job_id)

    def claim(owner):
        try:
            return jobs.claim(held, str(owner)).job.owner
        except StoreConflict:
            return None

    with ThreadPoolExecutor(16) as threads:
        winners = [owner for owner in threads.map(claim, range(16)) if owner is not None]
    assert winners == [jobs.read("", job_id).job.owner]
    assert jobs.read("", job_id).job.attempt == 1


def test_a_zombies_commit_is_refused(jobs, images):
    """An owner whose job was taken over cannot end it, and the other's pictures are the ones that stay."""
    job_id, _ = jobs.submit(request(), "")
    zombie = jobs.claim(jobs.read("", job_id), "zombie")
    heir = jobs.claim(jobs.read("", job_id), "heir")
    images.publish(job_id, request(), [painted(1)], "", zombie.job.attempt)
    with pytest.raises(StoreConflict):
        jobs.change(zombie, state="succeeded")
    ended = done(jobs, images, heir)
    jobs.settle(ended.job)
    assert [picture["file"] for picture in jobs.record("", job_id)["pictures"]] == ["2-0.png"]


def test_a_heartbeat_is_seen(jobs):
    """Every write makes another version, so that a living owner can be told from a dead one without its clock."""
    job_id, _ = jobs.submit(request(), "")
    held = jobs.claim(jobs.read("", job_id), "owner")
    versions = {(held := jobs.change(held, progress=(1, 4))).etag for _ in range(5)}
    assert len(versions) == 5


# --- ends


def test_settling_leaves_the_record_and_the_pictures_alone(jobs, images, objects):
    """Of a job that has succeeded there stay its pictures and its record: no photo, no draft, no lost attempt's."""
    job_id, _ = jobs.submit(request(), "acme")
    first = jobs.claim(jobs.read("acme", job_id), "lost")
    images.publish(job_id, request(), [painted()], "acme", first.job.attempt)
    held = done(jobs, images, jobs.claim(jobs.read("acme", job_id), "owner"))
    for _ in range(2):  # by its owner, and once more by somebody who found it
        jobs.settle(held.job)
    jobs.forget(held)
    assert keys(objects) == [f"images/{job_id}/2-0.png", f"images/{job_id}/record.json"]
    record = jobs.record("acme", job_id)
    assert (record["status"], record["attempt"]) == ("succeeded", 2)


def test_published_pictures_are_found_by_whoever_takes_over(jobs, images):
    """An owner lost between picture and record has not worked in vain."""
    job_id, _ = jobs.submit(request(), "")
    held = jobs.claim(jobs.read("", job_id), "lost")
    assert jobs.published(held.job) is None
    images.publish(job_id, request(), [painted()], "", 1)
    heir = jobs.claim(jobs.read("", job_id), "heir")
    assert jobs.published(heir.job) == 1


@pytest.mark.parametrize("state", ["cancelled", "failed"])
def test_an_end_without_pictures_has_a_record(jobs, objects, state):
    """What became of a job can be read after it is settled, and its photos are gone."""
    job_id, _ = jobs.submit(request(), "acme")
    held = jobs.change(jobs.claim(jobs.read("acme", job_id), "owner"), state=state, problem={"code": "no_face"})
    jobs.settle(held.job)
    jobs.forget(held)
    record = jobs.record("acme", job_id)
    assert (record["status"], record["pictures"], record["problem"]) == (state, [], {"code": "no_face"})
    assert keys(objects) == [f"images/{job_id}/record.json"]


def test_a_stopped_job_is_its_owners_no_longer(jobs):
    """Cancelling wins over whatever the owner is about to write."""
    job_id, _ = jobs.submit(request(), "")
    held = jobs.claim(jobs.read("", job_id), "owner")
    assert jobs.stop("", job_id, "cancelled").job.state == "cancelled"
    with pytest.raises(StoreConflict):
        jobs.change(held, state="succeeded")
    assert jobs.stop("", job_id, "cancelled").job.state == "cancelled"


def test_erasing_leaves_nothing(jobs, images, objects):
    """After DELETE there is no photo, picture, record or key, whether the job was open, settled or never a job."""
    running, _ = jobs.submit(request(), "acme", "one")
    images.publish(running, request(), [painted()], "acme", jobs.claim(jobs.read("acme", running), "o").job.attempt)
    ended, _ = jobs.submit(request(), "acme", "two")
    held = done(jobs, images, jobs.claim(jobs.read("acme", ended), "o"))
    jobs.settle(held.job)
    jobs.forget(held)
    images.save(plain := new_id(), request(), [painted()], "acme")
    for image_id in (running, ended, plain):
        with pytest.raises(ImageNotFound):
            jobs.erase("other", image_id)
        jobs.erase("acme", image_id)
    assert keys(objects) == [f"jobs/acme/{running}.json"]  # fences its owner off for a lease
    left = jobs.read("acme", running)
    jobs.settle(left.job)
    jobs.forget(left)
    assert keys(objects) == []


def test_erasing_leaves_the_key_of_another_job(jobs, objects):
    """A key that was used anew belongs to its new job; the old one's end does not take it away."""
    first, _ = jobs.submit(request(), "", "one")
    jobs.claim(jobs.read("", first), "owner")
    jobs.erase("", first)
    second, _ = jobs.submit(request(), "", "one")
    jobs.settle(jobs.read("", first).job)  # once more, a lease later
    assert jobs.submit(request(), "", "one") == (second, None)


def test_an_end_that_is_settled_late_brings_nothing_back(jobs, objects):
    """Whoever settles from an old reading, after others have settled and the caller has erased, writes nothing."""
    job_id, _ = jobs.submit(request(), "")
    held = jobs.change(jobs.claim(jobs.read("", job_id), "owner"), state="cancelled")
    jobs.settle(held.job)
    jobs.forget(held)
    jobs.erase("", job_id)
    jobs.settle(held.job)
    assert keys(objects) == []


def test_giving_back_is_not_being_lost(jobs):
    """Only an attempt that was cut off counts against a job, and may still write."""
    job_id, _ = jobs.submit(request(), "")
    held = jobs.claim(jobs.read("", job_id), "first")
    again = jobs.claim(jobs.change(held, state="queued", owner=""), "second")
    assert (again.job.attempt, again.job.lost, again.job.haunted) == (2, 0, False)
    stolen = jobs.claim(again, "third")
    assert (stolen.job.attempt, stolen.job.lost, stolen.job.haunted) == (3, 1, True)


def test_what_has_changed_is_not_forgotten(jobs):
    """Whoever settles a job does not remove the mark of one who erases it at the same time."""
    job_id, _ = jobs.submit(request(), "")
    held = jobs.change(jobs.read("", job_id), state="failed")
    jobs.erase("", job_id)
    jobs.forget(held)
    assert jobs.read("", job_id).job.state == "erased"


def test_strays_are_swept(jobs, objects, clock):
    """A photo whose request was never accepted does not stay for ever; one of an open job does."""
    stray, _ = jobs.submit(request(), "")
    objects.delete(f"jobs/_/{stray}.json")
    clock.now = begun(stray) + STRAY_SECONDS + 1
    kept, _ = jobs.submit(request(), "", "one")
    assert jobs.sweep() == 1
    assert keys(objects, "requests/") == [f"requests/{kept}.json"]
    clock.now += SETTINGS.replay_seconds + 1
    jobs.sweep()
    assert keys(objects, "idempotency/") == []


def test_images_without_a_record_are_swept(jobs, images, objects, clock):
    """Pictures whose service was killed before their record do not stay; an open job's, or a moment ago's, do."""
    job_id, _ = jobs.submit(request(), "")
    images.publish(job_id, request(), [painted()], "", 1)
    images.save(kept := new_id(), request(), [painted()])
    images.save(stray := new_id(), request(), [painted()])
    objects.delete(f"images/{stray}/record.json")
    clock.now = begun(stray) + STRAY_SECONDS - 1
    assert jobs.sweep() == 0
    clock.now = begun(stray) + STRAY_SECONDS + 2000  # as it goes by windows of 17 minutes
    assert jobs.sweep() == 1
    assert keys(objects, f"images/{stray}") == []
    assert keys(objects, f"images/{kept}") != []
    assert keys(objects, f"images/{job_id}") != []


def test_a_job_that_ends_during_a_sweep_keeps_its_picture(jobs, images, objects):
    """Between the listing of images and that of jobs it gets its record and is forgotten: it is no stray."""
    job_id, _ = jobs.submit(request(), "")
    held = jobs.claim(jobs.read("", job_id), "owner")
    images.publish(job_id, request(), [painted()], "", 1)

    def wanted():
        ended = jobs.change(held, state="succeeded")
        jobs.settle(ended.job)
        jobs.forget(ended)
        return {listed.id for listed in jobs.open_jobs()}

    assert images.sweep(begun(job_id) - 5000, begun(job_id) + 5000, wanted) == 0
    assert jobs.record("", job_id)["status"] == "succeeded"


# --- records and order


def test_a_job_survives_its_bytes():
    """What is read is what was written."""
    job = Job(new_id(), "acme", 1.0, 2.0, hook=Hook("https://a.example", ("failed",), 2, 3.5), progress=(1, 2))
    assert Job.from_json(job.to_json()) == job
    assert named(job.key) == ("acme", job.id)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"version": 1}', b'{"version": 2, "hook": null}'])
def test_damaged_jobs_are_told(data):
    """Bytes that are no job are an error of the store."""
    with pytest.raises(StoreCorrupt):
        Job.from_json(data)


def test_a_tenant_with_many_jobs_holds_up_only_itself():
    """Of equal priority each tenant's first goes before anybody's second, and what it has running counts."""
    jobs = [Job(f"{n:032x}", tenant, n, 99.0) for n, tenant in enumerate("aaabc")]
    assert [job.tenant for job in in_turn(jobs)] == ["a", "b", "c", "a", "a"]
    running = [Job("f" * 32, "b", 0, 99.0, state="running"), *jobs]
    assert [job.tenant for job in in_turn(running)] == ["a", "c", "a", "b", "a"]


def test_priority_goes_first():
    """A job of a higher priority is taken up before all others."""
    jobs = [Job("1" * 32, "a", 0, 99.0), Job("2" * 32, "a", 0, 99.0, priority=5)]
    assert [job.id[0] for job in in_turn(jobs)] == ["2", "1"]


def test_a_webhooks_address_is_kept_out_of_the_record(jobs, images, objects):
    """It may hold a secret, and a record is for reading."""
    asked = request(webhook="https://a.example/secret")
    job_id, _ = jobs.submit(asked, "")
    held = jobs.claim(jobs.read("", job_id), "owner")
    images.publish(job_id, asked, [painted()], "", 1)
    jobs.settle(jobs.change(held, state="succeeded").job)
    assert "secret" not in json.dumps(jobs.record("", job_id))

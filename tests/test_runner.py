"""Jobs as the ingress replicas run them, in one process: several services over one store and one board."""

import asyncio
import json
import threading
from collections import Counter
from contextlib import AsyncExitStack, suppress

import pytest

from deployments.board import Board
from deployments.outbox import SHARE
from deployments.reporter import Reporter
from deployments.service import waited
from pipeline.errors import (
    DeadlineExceeded,
    ImageNotFound,
    InternalError,
    NoFace,
    Overloaded,
    StoreMisconfigured,
    StoreUnavailable,
    WorkerUnavailable,
)
from pipeline.events import Previewed, Stepped
from pipeline.job_store import JobStore
from pipeline.objects_memory import MemoryObjects
from pipeline.progress import BEGINNING
from pipeline.request import Request
from pipeline.settings import JobSettings, Settings
from pipeline.store import ImageStore
from tests.fakes import A_FACE, painted
from tests.service import InProcess

QUICK = JobSettings(lease_seconds=0.5, scan_seconds=0.05, attempts=3, deadline_seconds=30)


def request(prompt="portrait", **fields):
    return Request(prompt=prompt, width=256, height=256, people=[{"photos": [A_FACE]}], num_steps=4, **fields)


class Made:
    """Makes pictures as a test says: `behaviour` is called before each, with the number of the call."""

    def __init__(self, behaviour=None):
        self.behaviour, self.calls, self.stopped = behaviour, 0, 0

    async def __call__(self, request, tenant, expires, progress):
        self.calls += 1
        try:
            if self.behaviour is not None:
                await self.behaviour(self.calls)
            for step in range(request.num_steps):
                progress(0, Stepped(step + 1, request.num_steps))
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        return [painted(number) for number in range(request.num_outputs)]


def house(tmp_path, make=None, objects=None, jobs=QUICK):
    return InProcess(Settings(weights_dir=tmp_path, jobs=jobs), objects, make=make or Made())


def run(*services, test):
    """A test while services live; they share the first one's board, as replicas do."""

    async def go():
        for service in services[1:]:
            for part in (service.jobs, service.runner, service.runner._worker):
                part._board = services[0].board
        async with AsyncExitStack() as lives, asyncio.timeout(25):
            for service in services:
                await lives.enter_async_context(service.life())
            await test()

    asyncio.run(go())


async def until(condition):
    """Let others run until something is so; the test's own limit of time ends it otherwise."""
    while not condition():
        await asyncio.sleep(0.005)


def keys(objects, prefix=""):
    return [entry.key for entry in objects.list(prefix)]


class Failing(MemoryObjects):
    """Objects whose server is away while `away` is set."""

    away = False

    def _reached(self):
        if self.away:
            raise StoreUnavailable("The store is away.")

    def _write(self, key, data, expected):
        self._reached()
        return super()._write(key, data, expected)

    def get(self, key):
        self._reached()
        return super().get(key)

    def delete(self, key):
        self._reached()
        super().delete(key)

    def list(self, prefix):
        self._reached()
        return super().list(prefix)


# --- the usual way


def test_a_job_goes_on_without_its_caller(tmp_path):
    """Accepted, run and settled; in the end there are its picture and its record and nothing else."""
    service = house(tmp_path)

    async def test():
        view, replayed = await service.jobs.submit(request(), "acme", None)
        assert (view["status"], replayed) == ("queued", False)
        view = await service.jobs.wait("acme", view["id"], 20)
        assert (view["status"], view["attempt"], len(view["images"])) == ("succeeded", 1, 1)
        with pytest.raises(ImageNotFound):
            await service.jobs.view("other", view["id"])
        await until(lambda: not keys(service.objects, "jobs/"))
        assert keys(service.objects) == [f"images/{view['id']}/1-0.png", f"images/{view['id']}/record.json"]

    run(service, test=test)


def test_every_event_comes_once_and_in_order(tmp_path):
    """A watcher sees queued, started, each step and the end; one who comes back half-way sees the other half."""
    service = house(tmp_path)

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        events = [event async for event in service.jobs.follow("", view["id"], BEGINNING) if event]
        assert [event.name for event in events] == ["queued", "started", *["step"] * 4, "succeeded"]
        assert [event.data["step"] for event in events if event.name == "step"] == [1, 2, 3, 4]
        again = [event async for event in service.jobs.follow("", view["id"], events[3].at) if event]
        assert again == events[4:]

    run(service, test=test)


def test_an_end_is_told_though_the_board_is_new(tmp_path):
    """A board that knows nothing any more does not keep anybody waiting: the store tells the end."""
    service, other = house(tmp_path), house(tmp_path, objects=MemoryObjects())

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        await service.jobs.wait("", view["id"], 20)
        service.jobs._board = other.board
        events = [event async for event in service.jobs.follow("", view["id"], BEGINNING) if event]
        assert [event.name for event in events] == ["succeeded"]
        assert events[0].data["images"]

    run(service, test=test)


def test_a_key_joins_and_replays(tmp_path):
    """The same request under one Idempotency-Key, sent to two replicas at once and later: made once."""
    first = house(tmp_path)
    second = house(tmp_path, objects=first.objects)
    wanted = request()

    async def test():
        answers = await asyncio.gather(*(one.jobs.submit(wanted, "", "k") for one in (first, second, first, second)))
        ids = {view["id"] for view, _ in answers}
        assert len(ids) == 1
        (job_id,) = ids
        view = await second.jobs.wait("", job_id, 20)
        assert view["status"] == "succeeded"
        assert await first.jobs.submit(wanted, "", "k") == (view, True)
        assert first.runner._worker._make.calls + second.runner._worker._make.calls == 1

    run(first, second, test=test)


def test_previews_are_small_pictures(tmp_path):
    """A preview reaches watchers as a JPEG that any client can show."""
    import base64

    import numpy as np

    async def go():
        service = house(tmp_path)
        reporter = Reporter(service.board, "a", 1)
        ((name, data),) = reporter.hear(0, Previewed(np.zeros((8, 8, 3), np.uint8)))
        await reporter.close()
        assert (name, data["media_type"]) == ("preview", "image/jpeg")
        assert base64.b64decode(data["data"]).startswith(b"\xff\xd8")

    asyncio.run(go())


def test_quick_steps_go_to_the_board_together():
    """A first event is told at once, what follows it quickly in one call, and an end without delay; all in order."""

    class Counting(Board):
        batches: tuple[int, ...] = ()

        async def publish(self, job_id, attempt, first, events):
            self.batches += (len(events),)
            return await super().publish(job_id, attempt, first, events)

    async def go():
        board = Counting(600)
        reporter = Reporter(board, "a", 1, gather=20)
        reporter.begin(1)
        assert len(await board.after("a", BEGINNING, 20)) == 1
        for step in range(28):
            reporter.hear(0, Stepped(step + 1, 28))
            await asyncio.sleep(0)
        reporter.end("succeeded", {})
        await reporter.close()
        assert board.batches == (1, 29)
        events = await board.after("a")
        assert [event.data["step"] for event in events[1:-1]] == list(range(1, 29))

    asyncio.run(go())


# --- what goes wrong


def test_bad_input_fails_at_once(tmp_path):
    """Whatever the caller has to mend is not tried again, and the job says what it is."""

    async def wall(_):
        raise NoFace("people[0].photos[0] shows no face.")

    service = house(tmp_path, make := Made(wall))

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        view = await service.jobs.wait("", view["id"], 20)
        assert (view["status"], view["error"]["code"], view["images"]) == ("failed", "no_face", [])
        assert make.calls == 1

    run(service, test=test)


def test_a_lost_worker_is_replaced(tmp_path):
    """A job whose worker was lost is tried again; its caller sees a later end, not an error."""

    async def lost(call):
        if call == 1:
            raise WorkerUnavailable("A worker was lost.")

    service = house(tmp_path, make := Made(lost))

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        assert (await service.jobs.wait("", view["id"], 20))["status"] == "succeeded"
        assert make.calls == 2

    run(service, test=test)


@pytest.mark.parametrize("error", [WorkerUnavailable("lost"), InternalError("a fault")])
def test_what_never_works_fails_in_the_end(tmp_path, error):
    """No job is tried for ever: after `attempts` it says why."""

    async def fails(_):
        raise error

    service = house(tmp_path, Made(fails))

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        view = await service.jobs.wait("", view["id"], 20)
        assert (view["status"], view["error"]["code"]) == ("failed", error.code)

    run(service, test=test)


def test_a_job_waits_for_room(tmp_path):
    """A denoiser that is full now has room later; being full does not count as a failure, and is no new start."""

    async def full(call):
        if call <= QUICK.attempts + 1:
            raise Overloaded("full")

    service = house(tmp_path, Made(full))

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        assert (await service.jobs.wait("", view["id"], 20))["status"] == "succeeded"
        names = [event.name for event in await service.board.after(view["id"])]
        assert names == ["queued", "started", *["step"] * 4, "succeeded"]

    run(service, test=test)


def test_what_is_begun_anew_is_told_so(tmp_path):
    """Where steps are lost with their worker watchers see a new start, not steps that go backwards for no reason."""

    class Breaking(Made):
        async def __call__(self, request, tenant, expires, progress):
            pictures = await super().__call__(request, tenant, expires, progress)
            if self.calls == 1:
                raise WorkerUnavailable("lost")
            return pictures

    service = house(tmp_path, Breaking())

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        assert (await service.jobs.wait("", view["id"], 20))["status"] == "succeeded"
        names = [event.name for event in await service.board.after(view["id"])]
        assert names == ["queued", *["started", *["step"] * 4] * 2, "succeeded"]

    run(service, test=test)


def test_what_not_even_alone_is_in_time_is_not_tried_again(tmp_path):
    """Later there would be even less time."""

    async def late(_):
        raise DeadlineExceeded("not even alone")

    service = house(tmp_path, make := Made(late))

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        view = await service.jobs.wait("", view["id"], 20)
        assert (view["status"], view["error"]["code"], make.calls) == ("failed", "deadline_exceeded", 1)

    run(service, test=test)


def test_a_deadline_ends_waiting(tmp_path):
    """A job that cannot be made in its time fails as such, and does not wait on."""

    async def full(_):
        raise Overloaded("full")

    service = house(tmp_path, Made(full))

    async def test():
        view, _ = await service.jobs.submit(request(deadline_seconds=0.6), "", None)
        view = await service.jobs.wait("", view["id"], 20)
        assert (view["status"], view["error"]["code"]) == ("failed", "deadline_exceeded")

    run(service, test=test)


def test_the_queue_is_bounded(tmp_path):
    """More jobs than the service keeps are refused while they can still be refused."""
    never = asyncio.Event

    async def wait(_):
        await never().wait()

    jobs = QUICK.model_copy(update={"max_open": 3, "max_running": 1})
    service = house(tmp_path, Made(wait), jobs=jobs)

    async def test():
        for _ in range(3):
            await service.jobs.submit(request(), "", None)
        await until(lambda: service.runner.open_jobs() == 3)
        assert service.runner.queued <= 3
        with pytest.raises(Overloaded):
            await service.jobs.submit(request(), "", None)

    run(service, test=test)


# --- stopping


def test_cancelling_stops_the_work_at_once(tmp_path):
    """The pictures of a cancelled job are no longer made, from whichever replica it was cancelled."""

    async def wait(_):
        await asyncio.Event().wait()

    first = house(tmp_path, make := Made(wait))
    second = house(tmp_path, objects=first.objects, make=make)

    async def test():
        view, _ = await first.jobs.submit(request(), "", None)
        await until(lambda: make.calls)
        view = await second.jobs.cancel("", view["id"])
        assert view["status"] == "cancelled"
        await until(lambda: make.stopped == make.calls)
        events = [event async for event in first.jobs.follow("", view["id"], BEGINNING) if event]
        assert events[-1].name == "cancelled"
        await until(lambda: not keys(first.objects, "jobs/"))
        assert keys(first.objects) == [f"images/{view['id']}/record.json"]
        assert (await first.jobs.cancel("", view["id"]))["status"] == "cancelled"

    run(first, second, test=test)


def test_erasing_a_running_job_leaves_nothing(tmp_path):
    """After DELETE there is no trace of a job, however far it was, once its owner can no longer write."""

    async def wait(_):
        await asyncio.Event().wait()

    service = house(tmp_path, make := Made(wait))

    async def test():
        view, _ = await service.jobs.submit(request(), "", "k")
        await until(lambda: make.calls)
        await service.jobs.erase("", view["id"])
        with pytest.raises(ImageNotFound):
            await service.jobs.view("", view["id"])
        await until(lambda: make.stopped and not keys(service.objects))

    run(service, test=test)


# --- owners that are lost


def test_a_job_of_a_dead_owner_is_taken_over(tmp_path):
    """Within its lease and a look, and it ends once; what the dead one had published is used."""
    objects, claimed = MemoryObjects(), []
    store = JobStore(objects, ImageStore(objects), QUICK)
    for published in (False, True):
        job_id, _ = store.submit(request(), "")
        held = store.claim(store.read("", job_id), "dead")
        if published:
            ImageStore(objects).publish(job_id, request(), [painted(9)], "", 1)
        claimed.append(held.job.id)
    service = house(tmp_path, make := Made(), objects)

    async def test():
        views = [await service.jobs.wait("", job_id, 20) for job_id in claimed]
        assert [view["status"] for view in views] == ["succeeded", "succeeded"]
        assert [view["pictures"][0]["file"] for view in views] == ["2-0.png", "1-0.png"]
        assert make.calls == 1

    run(service, test=test)


def test_an_end_that_nobody_settled_is_settled(tmp_path):
    """Between the commit and the record: whoever asks gets the whole answer, and the rest follows."""
    objects = MemoryObjects()
    store, images = JobStore(objects, ImageStore(objects), QUICK), ImageStore(objects)
    job_id, _ = store.submit(request(), "")
    held = store.claim(store.read("", job_id), "dead")
    images.publish(job_id, request(), [painted()], "", 1)
    store.change(held, state="succeeded")
    service = house(tmp_path, make := Made(), objects)

    async def test():
        assert len((await service.jobs.view("", job_id))["images"]) == 1
        await until(lambda: not keys(objects, "jobs/"))
        assert keys(objects) == [f"images/{job_id}/1-0.png", f"images/{job_id}/record.json"]
        assert make.calls == 0

    run(service, test=test)


def test_a_zombie_leaves_nothing(tmp_path):
    """An owner that was cut off finishes its pictures after another has taken over: they do not stay."""
    gate = asyncio.Event()

    async def slow(call):
        if call == 1:
            with suppress(asyncio.CancelledError):  # a zombie does not hear that it should stop
                await gate.wait()
            await gate.wait()

    objects = Failing()
    zombie = house(tmp_path, make := Made(slow), objects)

    async def test():
        view, _ = await zombie.jobs.submit(request(), "", None)
        await until(lambda: make.calls == 1)
        store = zombie.store
        stolen = store.claim(store.read("", view["id"]), "heir")
        zombie.images.publish(view["id"], request(), [painted(3)], "", 2)
        store.change(stolen, state="succeeded")
        await until(lambda: view["id"] not in zombie.runner._tasks or gate.set())
        assert (await zombie.jobs.wait("", view["id"], 20))["pictures"][0]["file"] == "2-0.png"
        await until(lambda: not keys(objects, "jobs/"))
        assert keys(objects) == [f"images/{view['id']}/2-0.png", f"images/{view['id']}/record.json"]

    run(zombie, test=test)


def test_a_restart_goes_on_with_everything(tmp_path):
    """All replicas end with jobs queued and running; new ones over the same store end them all, once each."""
    objects = MemoryObjects()

    async def wait(_):
        await asyncio.Event().wait()

    before = house(tmp_path, stuck := Made(wait), objects, QUICK.model_copy(update={"max_running": 2}))
    ids = []

    async def submit():
        ids.extend([(await before.jobs.submit(request(), "", None))[0]["id"] for _ in range(6)])
        await until(lambda: stuck.calls == 2)

    run(before, test=submit)
    after = house(tmp_path, make := Made(), objects)

    async def test():
        views = [await after.jobs.wait("", job_id, 20) for job_id in ids]
        assert [view["status"] for view in views] == ["succeeded"] * 6
        assert make.calls == 6

    run(after, test=test)


class Forgetful(MemoryObjects):
    """Objects whose server carries out a write of a job as `forget` says, and loses its answer."""

    forget = None

    def _write(self, key, data, expected):
        etag = super()._write(key, data, expected)
        if self.forget is not None and key.startswith("jobs/") and self.forget(json.loads(data)):
            self.forget = None
            raise StoreUnavailable("The answer was lost.")
        return etag


def test_a_heartbeat_whose_answer_was_lost_is_the_owners_own(tmp_path):
    """The next one, with other progress, finds it in its place: the job goes on, and is not begun again."""
    objects = Forgetful()

    class Slow(Made):
        async def __call__(self, request, tenant, expires, progress):
            for step in range(1000):
                progress(0, Stepped(step + 1, 2000))
                await asyncio.sleep(0.005)
                if objects.forget is None and step > 300:  # several heartbeats after the lost one
                    break
            return await super().__call__(request, tenant, expires, progress)

    service = house(tmp_path, make := Slow(), objects)
    objects.forget = lambda job: job["state"] == "running" and job["progress"] is not None

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        view = await service.jobs.wait("", view["id"], 20)
        assert objects.forget is None
        assert (view["status"], view["attempt"], make.calls) == ("succeeded", 1, 1)

    run(service, test=test)


def test_an_end_whose_answer_was_lost_is_the_owners_own(tmp_path):
    """It is settled at once, and not a lease later by whoever finds it unattended."""
    objects = Forgetful()
    service = house(tmp_path, Made(), objects, QUICK.model_copy(update={"lease_seconds": 60}))
    objects.forget = lambda job: job["state"] == "succeeded"

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        await until(lambda: objects.forget is None and not keys(objects, "jobs/"))
        assert (await service.jobs.view("", view["id"]))["status"] == "succeeded"

    run(service, test=test)


def test_a_job_that_is_being_claimed_is_given_back(tmp_path):
    """A replica that stops just then leaves it to the others at once, and it counts as lost by nobody."""
    gate, claiming = threading.Event(), threading.Event()

    class Slow(MemoryObjects):
        def _write(self, key, data, expected):
            if key.startswith("jobs/") and json.loads(data)["state"] == "running":
                claiming.set()
                gate.wait(20)
            return super()._write(key, data, expected)

    service = house(tmp_path, objects=Slow())

    async def test():
        job_id, _ = service.store.submit(request(), "")
        running = asyncio.ensure_future(service.runner._worker.run(service.store.read("", job_id), "me"))
        await asyncio.to_thread(claiming.wait, 20)
        running.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        job = service.store.read("", job_id).job
        assert (job.state, job.owner, job.lost, job.progress) == ("queued", "", 0, None)

    asyncio.run(test())


@pytest.mark.parametrize("moment", ["submit", "commit", "read"])
def test_a_store_that_is_away_loses_nothing(tmp_path, moment):
    """Refused at submit and at read with 503; at commit the worker waits for it."""
    objects = Failing()

    async def leave(_):
        objects.away = moment == "commit"

    service = house(tmp_path, make := Made(leave), objects)

    async def test():
        if moment == "submit":
            objects.away = True
            with pytest.raises(StoreUnavailable):
                await service.jobs.submit(request(), "", "k")
            objects.away = False
        view, replayed = await service.jobs.submit(request(), "", "k")
        if moment == "read":
            objects.away = True
            with pytest.raises(StoreUnavailable):
                await service.jobs.view("", view["id"])
        await until(lambda: make.calls or moment == "read")
        await asyncio.sleep(QUICK.lease_seconds)
        objects.away = False
        view = await service.jobs.wait("", view["id"], 20)
        assert (view["status"], view["attempt"], replayed) == ("succeeded", 1, False)
        assert make.calls == 1

    run(service, test=test)


class Deaf:
    """A receiver that never hears: every delivery is to be tried again, in an hour."""

    attempts = 5

    def __init__(self):
        self.tried = []

    def deliver(self, url, delivery_id, body, tenant):
        self.tried.append(delivery_id)
        return False

    def retry_delay(self, delivery_id, tries):
        return 3600.0


def test_a_dead_webhook_holds_up_nobody(tmp_path):
    """While its end is told again and again, a job takes no place among those that run."""
    jobs = QUICK.model_copy(update={"max_running": 1})
    service = InProcess(Settings(weights_dir=tmp_path, jobs=jobs), sender=(deaf := Deaf()), make=Made())

    async def test():
        first, _ = await service.jobs.submit(request(webhook="https://a.example/x"), "", None)
        second, _ = await service.jobs.submit(request(), "", None)
        for job in (first, second):
            assert (await service.jobs.wait("", job["id"], 20))["status"] == "succeeded"
        await until(lambda: deaf.tried)
        assert deaf.tried == [f"{first['id']}-succeeded"]

    run(service, test=test)


def test_receivers_that_hang_have_no_more_than_their_share(tmp_path):
    """However many jobs end at one of them: another's is told at once, each at its own first try, and once."""
    gate = threading.Event()

    class Hanging(Deaf):
        def deliver(self, url, delivery_id, body, tenant):
            self.tried.append(delivery_id)
            return gate.wait(20) if "hangs" in url else True

    service = InProcess(Settings(weights_dir=tmp_path, jobs=QUICK), sender=(slow := Hanging()), make=Made())

    async def test():
        try:
            for _ in range(40):
                await service.jobs.submit(request(webhook="https://hangs.example/x"), "", None)
            job, _ = await service.jobs.submit(request(webhook="https://a.example/x"), "", None)
            await until(lambda: f"{job['id']}-succeeded" in slow.tried)
            assert len(slow.tried) <= SHARE + 1
            await asyncio.sleep(3 * QUICK.lease_seconds)  # what waits for its turn is not taken for abandoned
        finally:
            gate.set()
        await until(lambda: not keys(service.objects, "jobs/"))
        assert Counter(slow.tried).most_common(1)[0][1] == 1
        assert len(slow.tried) == 41

    run(service, test=test)


# --- what is damaged, and who leaves


def test_a_damaged_job_stops_nobody_else(tmp_path):
    """A record that cannot be read, of a newer version say, is left alone; all other jobs are run."""
    objects = MemoryObjects()
    objects.create(f"jobs/_/{'0' * 32}.json", b'{"version": 99}')
    service = house(tmp_path, objects=objects)

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        assert (await service.jobs.wait("", view["id"], 20))["status"] == "succeeded"
        assert keys(objects, "jobs/") == [f"jobs/_/{'0' * 32}.json"]

    run(service, test=test)


def test_a_damaged_request_fails_its_job(tmp_path):
    """Its photos are no request any more: the job ends with that, and is not handed round for ever."""
    objects = MemoryObjects()
    job_id, _ = JobStore(objects, ImageStore(objects), QUICK).submit(request(), "")
    key = f"requests/{job_id}.json"
    objects.replace(key, b'{"prompt": 1}', objects.get(key).etag)
    service = house(tmp_path, make := Made(), objects)

    async def test():
        view = await service.jobs.wait("", job_id, 20)
        assert (view["status"], view["error"]["code"], make.calls) == ("failed", "store_corrupt", 0)

    run(service, test=test)


def test_an_error_that_nobody_foresaw_ends_its_job(tmp_path, caplog):
    """It is told by an id, without its own words, and no replica tries the job again."""

    async def bug(_):
        raise ZeroDivisionError("".join(("se", "cret")))  # a traceback quotes lines of code, and may

    service = house(tmp_path, make := Made(bug))

    async def test():
        view, _ = await service.jobs.submit(request(), "", None)
        view = await service.jobs.wait("", view["id"], 20)
        assert (view["status"], view["error"]["code"], make.calls) == ("failed", "internal_error", 1)
        assert "secret" not in str(view) + caplog.text

    run(service, test=test)


def test_a_stage_that_hangs_is_ended_by_the_deadline(tmp_path):
    """A job's deadline holds whatever it waits for."""

    async def hang(_):
        await asyncio.Event().wait()

    service = house(tmp_path, make := Made(hang))

    async def test():
        view, _ = await service.jobs.submit(request(deadline_seconds=0.3), "", None)
        view = await service.jobs.wait("", view["id"], 20)
        assert (view["status"], view["error"]["code"], make.stopped) == ("failed", "deadline_exceeded", 1)

    run(service, test=test)


@pytest.mark.parametrize("key", [None, "k"])
def test_who_leaves_while_submitting_leaves_no_job_unless_it_has_a_key(tmp_path, key):
    """Nobody could ever ask for it; with an Idempotency-Key one can."""
    gate = threading.Event()

    class Slow(MemoryObjects):
        def _write(self, name, data, expected):
            if name.startswith("requests/"):
                gate.wait(20)
            return super()._write(name, data, expected)

    service = house(tmp_path, objects=Slow())

    async def test():
        submitting = asyncio.ensure_future(service.jobs.submit(request(), "", key))
        await asyncio.sleep(0)
        submitting.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        await until(lambda: not keys(service.objects, "jobs/"))
        (name,) = [name for name in keys(service.objects, "images/") if name.endswith("record.json")]
        assert json.loads(service.objects.get(name).data)["status"] == ("cancelled" if key is None else "succeeded")

    run(service, test=test)


class Counted(Failing):
    """Objects that count how often they are listed and each is read; `full` refuses to write."""

    full = False

    def __init__(self):
        super().__init__()
        self.listings, self.reads = 0, Counter()

    def list(self, prefix):
        self.listings += prefix == "jobs/"
        return super().list(prefix)

    def get(self, key):
        self.reads[key] += 1
        return super().get(key)

    def _write(self, key, data, expected):
        if self.full:
            raise StoreMisconfigured("The disk is full.")
        return super()._write(key, data, expected)


@pytest.mark.parametrize("trouble", ["no writes", "a damaged draft", "another version"])
def test_trouble_with_one_job_is_not_tried_without_a_pause(tmp_path, trouble):
    """A job that cannot be claimed, settled or read costs a look now and then, not all of the processor."""
    objects = Counted()
    store = JobStore(objects, ImageStore(objects), QUICK)
    job_id, _ = store.submit(request(), "")
    troubled = f"jobs/_/{job_id}.json"
    if trouble == "a damaged draft":
        held = store.change(store.claim(store.read("", job_id), "dead"), state="succeeded")
        objects.create(troubled := f"images/{held.job.id}/1.json", b"{")
    if trouble == "another version":
        objects.replace(troubled, b'{"version": 99}', objects.get(troubled).etag)
    service = house(tmp_path, objects=objects)
    objects.full = trouble == "no writes"

    async def test():
        objects.reads.clear()
        leases = 5
        await asyncio.sleep(leases * QUICK.lease_seconds)
        assert objects.listings <= 4 * leases * QUICK.lease_seconds / QUICK.scan_seconds
        assert objects.reads[troubled] <= 2 * (leases + 1)

    run(service, test=test)


def test_a_job_that_was_accepted_is_told_though_the_store_goes_away(tmp_path):
    """Else its caller would send it again; and a watcher's stream goes on when the store is back."""
    objects = Failing()
    service = house(tmp_path, make := Made(), objects, QUICK.model_copy(update={"scan_seconds": 30}))
    submit = service.store.submit

    def submit_and_leave(*arguments):
        accepted = submit(*arguments)
        objects.away = True
        return accepted

    service.store.submit = submit_and_leave

    async def test():
        await until(lambda: service.runner._loops)
        view, _ = await service.jobs.submit(request(), "", None)
        assert view["status"] == "queued"
        waiting = asyncio.ensure_future(waited(service.jobs, "", view, 0.2, kept=True))
        assert (await waiting) == view
        objects.away = False
        service.runner._wake.set()
        assert (await service.jobs.wait("", view["id"], 20))["status"] == "succeeded"
        assert make.calls == 1

    run(service, test=test)


def test_jobs_count_from_the_moment_they_are_accepted(tmp_path):
    """A burst within one look does not get past the bounds."""

    async def wait(_):
        await asyncio.Event().wait()

    jobs = QUICK.model_copy(update={"max_open": 5, "max_running": 1, "scan_seconds": 30})
    service = house(tmp_path, Made(wait), jobs=jobs)

    async def test():
        answers = await asyncio.gather(
            *(service.jobs.submit(request(), "acme", None) for _ in range(5)), return_exceptions=True
        )
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        assert service.jobs.open_jobs("acme") == 5
        with pytest.raises(Overloaded):
            await service.jobs.submit(request(), "other", None)

    run(service, test=test)


def test_receivers_that_hang_keep_nobody_from_the_store(tmp_path):
    """A hundred webhooks that do not answer, and a status is read as quickly as before."""
    gate = threading.Event()

    class Hanging(Deaf):
        def deliver(self, url, delivery_id, body, tenant):
            gate.wait(20)

    service = InProcess(Settings(weights_dir=tmp_path, jobs=QUICK), sender=Hanging(), make=Made())

    async def test():
        try:
            views = [
                (await service.jobs.submit(request(webhook="https://a.example/x"), "", None))[0] for _ in range(100)
            ]
            for view in views:
                await service.jobs.cancel("", view["id"])
            async with asyncio.timeout(2):
                await service.jobs.view("", views[0]["id"])
        finally:
            gate.set()

    run(service, test=test)


def test_progress_is_of_all_pictures(tmp_path):
    """Four pictures of 28 steps have 112 steps, also before the first heartbeat."""
    service = house(tmp_path)

    async def go():
        reporter = Reporter(service.board, "a", 2)
        reporter.begin(4)
        reporter.hear(0, Stepped(1, 28))
        ((_, data),) = reporter.hear(3, Stepped(2, 28))
        await reporter.close()
        assert (data["done"], data["total"]) == (3, 112)

    asyncio.run(go())

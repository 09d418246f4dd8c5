import asyncio
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.schema import ServeDeploySchema

from deployments.app import GPU_SHARES, AppArgs, Parts, build, defaults, wire
from deployments.denoiser import FluxDenoiser
from deployments.remote import told
from deployments.stages import HANGING, FaceDetector, IdentityEncoder, Replica, TextEncoder
from pipeline import errors, flow
from pipeline.caches import Cache
from pipeline.events import Stepped, last
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.settings import EngineSettings, LimitSettings, Settings
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
    memory_objects,
    memory_store,
    note,
    notes,
)

CONFIG = yaml.safe_load((Path(__file__).parent.parent / "serve_config.yaml").read_text())
(APPLICATION,) = CONFIG["applications"]
SCALED = [one for one in APPLICATION["deployments"] if one["name"] != "Board"]  # of which there is one
FAKES = Parts(FakeFaces, FakeIdentity, FakeText, FakeDenoise, memory_objects, fake_models)


def request(prompt="portrait", photo=A_FACE, **fields):
    people = [{"photos": [photo]}]
    return Request.model_validate(
        {"prompt": prompt, "width": 256, "height": 256, "seed": 7, "people": people, **fields}
    )


@pytest.fixture
def settings(tmp_path):
    return Settings(weights_dir=tmp_path)


# --- the application in Serve's local testing mode


@pytest.fixture
def local(settings):
    """The application with fake stages, in this process; Serve marks the mode's argument as provisional."""
    handle = serve.run(wire(settings, FAKES), name="local", _local_testing_mode=True)
    return lambda wanted: handle.generate.remote(wanted).result(timeout_s=20)


def test_the_deployments_give_what_generate_gives(local, settings):
    """The same request gives the same pixels in one process and through the deployments."""
    stages = flow.Stages(
        faces=FakeFaces(settings).detect,
        identity=FakeIdentity(settings).encode,
        text=FakeText(settings).encode,
        denoise=FakeDenoise(settings).denoise,
    )
    wanted = request(num_outputs=2, true_cfg=2.0)
    ours = flow.generate(wanted, stages, memory_store()).record["pictures"]
    theirs = local(wanted).record["pictures"]
    assert [picture["sha256"] for picture in theirs] == [picture["sha256"] for picture in ours]


def test_progress_reaches_the_ingress(settings):
    """Whoever asks the ingress for pictures is told every step of each, while they are drawn."""
    handle, folder = serve.run(wire(settings, FAKES), name="local", _local_testing_mode=True), settings.weights_dir

    def progress(number, event):  # Serve copies it, as if to another process
        if isinstance(event, Stepped):
            note(folder, "told", number, event.done, event.total)

    handle.generate.remote(request(num_outputs=2, num_steps=3), "", progress).result(timeout_s=20)
    assert notes(folder, "told") == {f"{number}-{done}-3" for number in (0, 1) for done in (1, 2, 3)}


def test_a_stages_error_reaches_the_caller(local):
    """A photo without a face is NoFace, with its own words."""
    with pytest.raises(errors.NoFace, match=r"^people\[0\]\.photos\[0\] shows no face\.$"):
        local(request(photo=NO_FACE))


def test_an_unforeseen_error_is_told_by_an_id(local, caplog):
    """A bug in a stage arrives as InternalError, without the words of the original."""
    with pytest.raises(errors.InternalError) as caught:
        local(request(CRASH))
    assert "secret" not in str(caught.value) + caplog.text
    assert "ZeroDivisionError" in caplog.text


# --- the replicas as plain objects


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_no_deployment_scales_beyond_what_it_takes():
    """A target above max_ongoing_requests would never be reached, and Ray warns of it at every deploy."""
    taken = defaults(Settings(**APPLICATION["args"]))
    for deployment in SCALED:
        most = deployment.get("max_ongoing_requests", taken[deployment["name"]]["max_ongoing_requests"])
        assert deployment["autoscaling_config"]["target_ongoing_requests"] <= most


def test_one_bad_face_fails_alone(settings):
    """Of people encoded at once, and one right after another, only the bad one fails; nobody waits for ever."""

    async def go():
        faces, encoder = FaceDetector(settings, FakeFaces), IdentityEncoder(settings, FakeIdentity)
        found = [await faces.detect(request(photo=photo).people[0], 0) for photo in (A_FACE, POISON, A_FACE)]
        results = await asyncio.gather(*(encoder.encode(one, "mean") for one in found), return_exceptions=True)
        return [*results, await encoder.encode(found[0], "mean"), await encoder.encode(found[2], "mean")]

    first, poisoned, *others = run(go())
    assert isinstance(poisoned, errors.InternalError)
    assert all((first.tokens == other.tokens).all() for other in others)


def test_a_slow_photo_holds_up_nobody(settings):
    """While one person's photos are still being read, another's faces are found; a cancelled reading ends."""
    reading, stopped = threading.Event(), threading.Event()

    class Slow:
        cache = Cache(0, size=lambda value: 0)

        def detect(self, person, index, tenant, cancelled):
            if index == 0:
                return FakeFaces(settings).detect(person, index)
            reading.set()
            while not cancelled():
                stopped.wait(0.01)
            stopped.set()
            raise errors.Cancelled("The request was cancelled.")

    async def go():
        replica, person = FaceDetector(settings, lambda _: Slow()), request().people[0]
        slow = asyncio.ensure_future(replica.detect(person, 1))
        await asyncio.to_thread(reading.wait)
        assert await replica.detect(person, 0)
        slow.cancel()
        await asyncio.wait([slow])

    run(go())
    assert stopped.is_set()


@pytest.mark.parametrize("error", [errors.PictureInvalid("black"), ValueError("a bug")])
def test_a_replica_that_only_fails_is_replaced(settings, error):
    """Faults of ours in a row make a replica unhealthy; bad input and a success do not count."""
    replica = Replica(settings)

    def fail(error):
        raise error

    async def go():
        for failure in [error, error, errors.NoFace("no face"), error, error]:
            with pytest.raises(errors.PipelineError):
                await replica._run(fail, failure)
        replica.check_health()
        with pytest.raises(errors.PipelineError):
            await replica._run(fail, error)
        with pytest.raises(RuntimeError, match="in a row"):
            replica.check_health()
        await replica._run(int)
        replica.check_health()

    run(go())


def test_a_call_that_hangs_makes_its_replica_unhealthy(settings):
    """A call that runs on long after its request is over is seen by the health check."""
    impatient = settings.model_copy(update={"limits": LimitSettings(request_seconds=0.001)})
    replica, release, begun = Replica(impatient), threading.Event(), threading.Event()
    replica._patience -= HANGING

    def hang():
        begun.set()
        release.wait()

    async def go():
        work = asyncio.ensure_future(replica._run(hang))
        await asyncio.to_thread(begun.wait)
        while time.monotonic() - next(iter(replica._running.values())) <= replica._patience:
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="does not end"):
            replica.check_health()
        release.set()
        await work
        replica.check_health()

    run(go())


async def drawn(replica, wanted, seen=None):
    """The picture of a request, whose other events go to `seen`."""
    prompt = await TextEncoder(Settings(weights_dir=replica.folder), FakeText).encode("p", 128)
    if seen is None:
        return await replica.denoise(wanted, 0, prompt, None)
    return await last(replica.watch(wanted, 0, prompt, None), seen.append)


@pytest.fixture
def replica(settings):
    """A FluxDenoiser as Serve makes one."""
    made = FluxDenoiser(settings.model_copy(update={"engine": EngineSettings(preview_steps=2)}), FakeDenoise)
    made.folder = settings.weights_dir
    return made


def test_progress_is_streamed(replica):
    """A picture's events come in their order: queued, every step, previews between, the picture."""
    seen = []
    picture = run(drawn(replica, request(people=[], num_steps=4), seen))
    assert picture.steps == 4
    assert [type(event).__name__ for event in seen] == ["Queued", "Stepped", "Stepped", "Previewed"] + ["Stepped"] * 2
    assert [event.done for event in seen if isinstance(event, Stepped)] == [1, 2, 3, 4]


def test_cancelling_frees_the_row_and_a_picture_behind_it_goes_on(replica):
    """A cancelled denoise leaves within a step, while others go on; nothing of it is left."""

    async def go():
        endless = asyncio.ensure_future(drawn(replica, request(ENDLESS, people=[])))
        while not notes(replica.folder, "step"):
            await asyncio.sleep(0)
        behind = asyncio.ensure_future(drawn(replica, request(people=[], seed=8)))
        endless.cancel()
        await asyncio.wait([endless])
        picture = await behind
        (stopped,) = notes(replica.folder, "stopped-7")
        steps = {int(note.split("-")[1]) for note in notes(replica.folder, "step")}
        assert int(stopped) == max(steps) + 1
        return picture

    assert run(go()).steps == 28
    stats = replica._engine.stats()
    assert (stats.waiting, stats.running, stats.drawn) == (0, 0, 0)
    assert (stats.done, stats.cancelled) == (1, 1)


def test_a_cancelled_request_in_the_queue_never_starts(replica):
    """Who goes away before the turn costs nothing."""

    async def go():
        first = asyncio.ensure_future(drawn(replica, request(ENDLESS, seed=1)))
        while not notes(replica.folder, "step"):
            await asyncio.sleep(0)
        second = asyncio.ensure_future(drawn(replica, request(ENDLESS, seed=2)))
        while not replica._engine.stats().waiting:
            await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        await asyncio.wait([first, second])

    run(go())
    assert {note.split("-")[0] for note in notes(replica.folder, "step")} == {"1"}


def test_a_watched_picture_that_waits_leaves_within_a_step(replica):
    """Whoever stops watching in the queue makes room for others while the picture ahead goes on."""

    async def go():
        first = asyncio.ensure_future(drawn(replica, request(ENDLESS, seed=1)))
        while not notes(replica.folder, "step"):
            await asyncio.sleep(0)
        watching = asyncio.ensure_future(drawn(replica, request(ENDLESS, seed=2), seen=[]))
        while not replica._engine.stats().waiting:
            await asyncio.sleep(0)
        watching.cancel()
        await asyncio.wait([watching])
        before = replica._engine.stats().steps
        while replica._engine.stats().waiting:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        return replica._engine.stats().steps - before

    assert run(go()) <= 2  # the one that ran, and one in which the second was gone


def test_a_short_picture_overtakes_a_long_one(replica):
    """One denoiser takes several pictures at once, and the short one need not wait for the long one's end."""

    async def go():
        endless = asyncio.ensure_future(drawn(replica, request(ENDLESS)))
        while not notes(replica.folder, "step"):
            await asyncio.sleep(0)
        picture = await drawn(replica, request(people=[], num_steps=1))
        endless.cancel()
        await asyncio.wait([endless])
        return picture

    assert run(go()).steps == 1


def test_a_request_beyond_its_deadline_fails(replica):
    """deadline_seconds ends a picture that takes longer."""
    with pytest.raises(errors.DeadlineExceeded):
        run(drawn(replica, request(ENDLESS, deadline_seconds=0.05)))


def test_a_deadline_does_not_begin_anew_at_the_denoiser(settings):
    """A request that has used up its time in the stages before is not drawn at all."""

    class Slow(FakeText):
        def encode(self, prompt, length):
            threading.Event().wait(0.2)  # longer than the request may take
            return super().encode(prompt, length)

    parts = replace(FAKES, text=Slow)
    handle = serve.run(wire(settings, parts), name="local", _local_testing_mode=True)
    with pytest.raises(errors.DeadlineExceeded):
        handle.generate.remote(request(num_steps=1, deadline_seconds=0.1)).result(timeout_s=20)


def test_a_full_engine_refuses(settings):
    """Beyond engine.max_jobs a picture is Overloaded at once."""
    full = FluxDenoiser(settings.model_copy(update={"engine": EngineSettings(max_jobs=1)}), FakeDenoise)
    full.folder = settings.weights_dir

    async def go():
        endless = asyncio.ensure_future(drawn(full, request(ENDLESS)))
        while not notes(full.folder, "step"):
            await asyncio.sleep(0)
        with pytest.raises(errors.Overloaded):
            await drawn(full, request())
        endless.cancel()
        await asyncio.wait([endless])
        return await drawn(full, request(people=[]))  # there is room as soon as the other has been cancelled

    assert run(go())


def test_decoding_overlaps_with_the_steps_of_others(settings):
    """While one picture is decoded another's steps go on: this one's decoding ends only after the other has stepped."""
    stepped = threading.Event()

    class Slow(FakeDenoise):
        def advance(self, drawings):
            super().advance(drawings)
            if drawings[0].work.seed == 2:
                stepped.set()

        def finish(self, drawing):
            assert stepped.wait(20)
            return super().finish(drawing)

    replica = FluxDenoiser(settings, Slow)
    replica.folder = settings.weights_dir

    async def go():
        pictures = [drawn(replica, request(people=[], num_steps=1, seed=seed)) for seed in (1, 2)]
        return await asyncio.gather(*pictures)

    assert [picture.seed for picture in run(go())] == [1, 2]


@pytest.mark.parametrize(("hangs_in", "what"), [("advance", "step"), ("preview", "step"), ("finish", "decoding")])
def test_whatever_hangs_makes_its_replica_unhealthy(settings, hangs_in, what):
    """The health check sees a step, preview or decoding that takes longer than engine.step_seconds, and its end."""
    begun, release = threading.Event(), threading.Event()

    def hang(self, drawing):
        begun.set()
        release.wait()
        return getattr(FakeDenoise, hangs_in)(self, drawing)

    engine = EngineSettings(step_seconds=0.5, preview_steps=1)
    hanging = type("Hanging", (FakeDenoise,), {hangs_in: hang})
    replica = FluxDenoiser(settings.model_copy(update={"engine": engine}), hanging)
    replica.folder = settings.weights_dir

    async def go():
        picture = asyncio.ensure_future(drawn(replica, request(people=[], num_steps=2), seen=[]))
        await asyncio.to_thread(begun.wait)
        replica.check_health()
        while max(replica._steps.seconds(), replica._finishes.seconds()) <= 0.5:
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match=f"a {what} takes longer"):
            replica.check_health()
        release.set()
        await picture
        while replica._finishes.seconds():  # the picture is told within the turn that made it
            await asyncio.sleep(0)
        replica.check_health()

    run(go())


def test_a_step_that_compiles_is_given_more_time(settings):
    """While torch.compile works, and engine.step_seconds beyond, a step may take ten times as long; then it hangs."""
    begun, release = threading.Event(), threading.Event()

    class Compiling(FakeDenoise):
        idle = 0.0

        def compiler_idle_seconds(self):
            return self.idle

        def advance(self, drawings):
            begun.set()
            release.wait()

    engine = EngineSettings(step_seconds=0.1)
    replica = FluxDenoiser(settings.model_copy(update={"engine": engine}), Compiling)
    replica.folder = settings.weights_dir

    async def go():
        picture = asyncio.ensure_future(drawn(replica, request(people=[])))
        await asyncio.to_thread(begun.wait)
        while replica._steps.seconds() < 0.2:
            await asyncio.sleep(0)
        replica.check_health()
        replica._stage.idle = 0.2  # the compiler is done, the step is not
        with pytest.raises(RuntimeError, match="a step takes longer"):
            replica.check_health()
        replica._stage.idle = 0.0
        while replica._steps.seconds() < 1.01:
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="a step takes longer"):
            replica.check_health()
        release.set()
        picture.cancel()
        await asyncio.wait([picture])

    run(go())


def test_an_engine_that_dies_fails_all_its_pictures(settings, caplog):
    """They are told an id that the log has too; the replica is unhealthy and takes no more."""

    class Dying(FakeDenoise):
        def engine(self):
            engine, second = super().engine(), threading.Event()

            def step():
                second.wait(20)
                raise ZeroDivisionError(CRASH)

            engine.step, self.second = step, second
            return engine

    replica = FluxDenoiser(settings, Dying)
    replica.folder = settings.weights_dir

    async def go():
        pictures = [asyncio.ensure_future(drawn(replica, request(people=[], seed=seed))) for seed in (1, 2)]
        while replica._engine.stats().waiting < 2:
            await asyncio.sleep(0)
        replica._stage.second.set()
        told = await asyncio.gather(*pictures, return_exceptions=True)
        assert [type(error) for error in told] == [errors.InternalError] * 2
        with pytest.raises(errors.WorkerUnavailable):
            await drawn(replica, request())
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            replica.check_health()
        return str(told[0])

    assert run(go()).split()[-1].rstrip(".") in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


def test_a_denoiser_whose_gpus_are_out_of_step_is_replaced(settings):
    """The health check asks the stage, which knows when a rank is gone."""

    class Alone(FakeDenoise):
        def check(self):
            raise errors.WorkerUnavailable("The GPUs of this denoiser have lost each other; send the request again.")

    with pytest.raises(errors.WorkerUnavailable, match="lost each other"):
        FluxDenoiser(settings, Alone).check_health()


def test_pictures_come_and_go_while_others_are_drawn(settings):
    """Of 200 pictures, many of which are cancelled at any moment, each ends once, and nothing of them is left."""
    engine = EngineSettings(max_jobs=200, preview_steps=2)
    replica = FluxDenoiser(settings.model_copy(update={"engine": engine}), FakeDenoise)
    replica.folder, dice = settings.weights_dir, random.Random(0)

    async def one(seed):
        picture = asyncio.ensure_future(drawn(replica, request(people=[], seed=seed, num_steps=dice.randint(1, 9))))
        for _ in range(dice.randint(0, 400)):
            await asyncio.sleep(0)
        if dice.random() < 0.5:
            picture.cancel()
        return (await asyncio.gather(picture, return_exceptions=True))[0]

    async def go():
        ends = [type(end) for end in await asyncio.gather(*map(one, range(200)))]
        stats = replica._engine.stats()
        while stats.waiting + stats.running + stats.drawn:
            await asyncio.sleep(0)
            stats = replica._engine.stats()
        replica.check_health()
        return ends, stats

    ends, stats = run(go())
    assert set(ends) == {Picture, asyncio.CancelledError}
    assert ends.count(Picture) <= stats.done <= 200 - stats.cancelled  # one may be cancelled just when it is done
    assert stats.failed == 0


def test_a_denoiser_that_only_fails_is_replaced(replica):
    """Three pictures in a row that fail through no caller's fault make a denoiser unhealthy."""

    async def go():
        for _ in range(3):
            replica.check_health()
            with pytest.raises(errors.InternalError):
                await drawn(replica, request(CRASH))
        with pytest.raises(RuntimeError, match="in a row"):
            replica.check_health()

    run(go())


def test_a_stage_runs_outside_the_event_loop(settings):
    """A replica answers health checks while its stage computes."""
    seen = []

    class Looking:
        cache = Cache(0, size=lambda value: 0)

        def __init__(self, settings):
            pass

        def encode(self, prompt, length):
            seen.append(threading.current_thread())
            return prompt

    assert run(TextEncoder(settings, Looking).encode("p", 128)) == "p"
    assert seen[0] is not threading.main_thread()


# --- what a failed call means


def wrapped(error):
    """As Ray hands an error from replica to replica: wrapped, and of both types."""
    return RayTaskError("call", "Traceback: a secret", error, "proctitle", 1, "ip").as_instanceof_cause()


def test_errors_are_told_by_their_innermost_cause():
    """However many replicas an error crossed, type and words are the original's."""
    error = told(wrapped(wrapped(errors.NoFace("No face here."))))
    assert (type(error), str(error)) == (errors.NoFace, "No face here.")


def test_full_queues_and_lost_workers_have_their_own_errors():
    """Back-pressure is Overloaded, a dead worker WorkerUnavailable, all else InternalError without its words."""
    lost = RayServeException("an upstream actor died")
    lost.__cause__ = ActorDiedError()
    assert type(told(wrapped(BackPressureError(1, 1)))) is errors.Overloaded
    assert type(told(lost)) is errors.WorkerUnavailable
    assert type(told(wrapped(ActorDiedError()))) is errors.WorkerUnavailable
    bug = told(wrapped(ValueError("a secret")))
    assert type(bug) is errors.InternalError
    assert "secret" not in str(bug)


# --- serve_config.yaml and the options


def known(config, parsed, path=""):
    """Every key of a config that Ray has not kept: those it does not know."""
    if isinstance(config, dict) and isinstance(parsed, dict):
        missing = [f"{path}.{key}" for key in config if key not in parsed]
        return missing + [
            p for key in config if key in parsed for p in known(config[key], parsed[key], f"{path}.{key}")
        ]
    if isinstance(config, list):
        return [
            p for index, pair in enumerate(zip(config, parsed, strict=True)) for p in known(*pair, f"{path}[{index}]")
        ]
    return []


def test_ray_knows_every_key_of_the_config():
    """Ray drops what it does not know without a word; nothing in serve_config.yaml is dropped."""
    assert known(CONFIG, ServeDeploySchema(**CONFIG).model_dump(exclude_unset=True)) == []
    for deployment in SCALED:
        scaling = deployment["autoscaling_config"]
        assert known(scaling, AutoscalingConfig(**scaling).model_dump(exclude_unset=True)) == []
    misspelt = {"applications": [{**APPLICATION, "deployments": [{"name": "Ingress", "max_ongoing_request": 1}]}]}
    assert known(misspelt, ServeDeploySchema(**misspelt).model_dump(exclude_unset=True)) == [
        ".applications[0].deployments[0].max_ongoing_request"
    ]


def test_a_misspelt_argument_is_refused():
    """`args` of the config are settings, and only settings."""
    with pytest.raises(ValidationError, match="presett"):
        AppArgs(presett="flux-dev")


def deployments(application):
    """All deployments of a bound application, by name."""
    found, left = {}, [application]
    while left:
        deployment = left.pop()._bound_deployment
        found[deployment.name] = deployment
        left += [arg for arg in deployment.init_args if isinstance(arg, Application)]
        left += [a for arg in deployment.init_args if isinstance(arg, dict) for a in arg.values()]
    return found


def test_the_config_names_the_deployments_that_exist():
    """Each deployment of build() has its block in serve_config.yaml, and no block names another."""
    built = deployments(build(AppArgs(**APPLICATION["args"])))
    assert built.keys() == {deployment["name"] for deployment in APPLICATION["deployments"]}


def test_every_queue_is_bounded_and_says_when_to_come_back():
    """A full queue answers 429 with Retry-After, and a rollout waits for the longest request."""
    args = AppArgs(**APPLICATION["args"])
    for deployment in deployments(build(args)).values():
        assert 0 < deployment.max_queued_requests < 1000
        assert deployment.backpressure_config.status_code == 429
        assert deployment.backpressure_config.retry_after_s == args.limits.retry_after_seconds
        assert deployment._deployment_config.graceful_shutdown_timeout_s > args.limits.request_seconds
    assert CONFIG["http_options"]["request_timeout_s"] > args.limits.request_seconds


def test_the_stages_share_one_gpu_and_keep_to_their_nodes():
    """FaceDetector and Ingress run on CPU nodes; the others fit on one GPU together, and two denoisers never."""
    options = {d["name"]: d["ray_actor_options"] for d in APPLICATION["deployments"]}
    shares = {name: option["num_gpus"] for name, option in options.items() if "num_gpus" in option}
    assert shares == GPU_SHARES
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["FluxDenoiser"] > 0.5
    for name, option in options.items():
        assert option["label_selector"] == {"pool": "gpu" if name in shares else "cpu"}


def test_the_application_runs_on_a_machine_without_a_gpu():
    """By default no deployment asks for one, and all fit on two cores."""
    built = deployments(build(AppArgs()))
    assert all(deployment.ray_actor_options.get("num_gpus", 0) == 0 for deployment in built.values())
    assert sum(deployment.ray_actor_options["num_cpus"] for deployment in built.values()) <= 2

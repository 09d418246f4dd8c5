"""B10 and B12: what serving costs, and what it does when more comes than it can do; on a local Ray cluster."""

import asyncio
import base64
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from bench.load import PATH, Load, arrivals, encoded, send
from bench.load_report import report
from bench.measure import Part, Result, at_least, at_most, compared, exactly, seconds
from bench.noop import STEP_SECONDS, NoDenoise, NoFaces, NoIdentity, NoText, memory_objects, no_ops, timed
from bench.registry import Run
from cluster.local import free_port, running
from pipeline import flow
from pipeline.request import Request
from pipeline.settings import LimitSettings, Settings
from pipeline.store import ImageStore

if TYPE_CHECKING:
    from deployments.app import Parts

PHOTO_BYTES = 300_000
FIELDS = {"prompt": "a portrait", "seed": 1}
TIMED_STEPS = 4
QUEUE = 4  # requests in the making, so that the last of them is done within the SLO
SLO_SCALE = 5  # the SLO, in service times
LOADS = (0.3, 0.6, 0.9, 1.2, 2.0)
SWEEP_SECONDS, QUICK_SECONDS, FULL_RUNS = 30.0, 4.0, 15
TIMES = 10  # no-op requests are quick: so many times more runs
MILLISECONDS = 1e3


def http_overhead(run: Run) -> Result:
    """A request over HTTP and Ray that is answered by its picture, less the same stages in one process."""
    body, many = _body(num_steps=1), _body(num_steps=28)
    with service(Settings(), no_ops) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        from bench import bare  # imports Ray, which reads the environment that `service` sets

        bare.deploy()
        sent = encoded(body)[0]
        alone = _in_process(Settings(), body)
        runs = _triples(alone, lambda: _picture(client, body), TIMES * run.runs)
        floor = _triples(alone, lambda: _post(client, bare.ROUTE + "/", content=sent), TIMES * run.runs)
        fetched = _triples(alone, lambda: _over_http(client, body), run.runs)
        steps = _triples(_in_process(Settings(), many), lambda: _picture(client, many), run.runs)
    return Result(
        parts=(Part("P50", _difference(runs), at_most(25), "ms"),),
        noise=compared(runs).noise,
        method=f"a photo of {PHOTO_BYTES // 1000} KB in, a picture of 1.5 MB out in one request, stages that compute "
        "nothing but hand on records of true sizes; less flow.generate in one process. Client, ingress and replicas "
        f"share the cores. Bare deployments of Serve that hand on as many bytes over as many hops: "
        f"{_difference(floor):.1f} ms in the same run; fetching the picture by a second request: "
        f"{_difference(fetched):.1f} ms; with 28 steps: {_difference(steps):.1f} ms.",
        details={
            "in_process_ms": MILLISECONDS * compared(runs).a,
            "bare Serve, as many bytes and hops, ms": _difference(floor),
            "the picture fetched by a second request, ms": _difference(fetched),
            "28 steps, ms": _difference(steps),
        },
    )


def overload(run: Run) -> Result:
    """Open-loop load from below the capacity to twice of it: goodput under an SLO, and how sheds are answered."""
    service_seconds = TIMED_STEPS * STEP_SECONDS
    slo, capacity = SLO_SCALE * service_seconds, 1 / service_seconds
    settings = Settings(limits=LimitSettings(max_requests=QUEUE, retry_after_seconds=1))
    bodies = encoded(_body(num_steps=TIMED_STEPS))
    span = SWEEP_SECONDS if run.runs >= FULL_RUNS else QUICK_SECONDS
    with service(settings, timed) as url:
        points = [{"load": load} | _point(url + PATH, bodies, load * capacity, span, slo) for load in LOADS]
    by_load = {point["load"]: point for point in points}
    below, twice = by_load[0.9], by_load[2.0]
    return Result(
        parts=(
            Part("goodput", twice["goodput"] / below["goodput"], at_least(0.9)),
            Part("a shed request's answer, P99", MILLISECONDS * twice["shed_latency"]["p99"], at_most(50), "ms"),
            Part("sheds without Retry-After", twice["shed"] - twice["shed_with_retry_after"], exactly(0)),
            Part("failures other than sheds", twice["arrivals"] - twice["completed"] - twice["shed"], exactly(0)),
        ),
        method=f"open-loop Poisson arrivals for {span:g} s a load over HTTP; one replica whose denoiser takes "
        f"{service_seconds:g} s a picture, at most {QUEUE} requests in the making, SLO {slo:g} s.",
        details={
            "slo": slo,
            "capacity": capacity,
            "goodput at twice / 0.9 of the capacity itself": twice["goodput"] / (0.9 * capacity),
            "sweep": points,
        },
    )


def _point(url: str, bodies: Sequence[bytes], rate: float, span: float, slo: float) -> dict[str, Any]:
    load = Load(url, bodies, arrivals(rate, span, seed=2))
    return report(asyncio.run(send(load, timeout=60)), rate, span, slo)


@contextmanager
def service(settings: Settings, parts: "Callable[[], Parts]") -> Iterator[str]:
    """The application with these parts, warm: its address."""
    with (
        tempfile.TemporaryDirectory(prefix="pulid-bench-") as folder,
        running(settings.model_copy(update={"weights_dir": folder}), "127.0.0.1", free_port(), parts) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        for _ in range(10):
            _over_http(client, _body(num_steps=1))
        yield url


def _body(**fields: Any) -> dict[str, Any]:
    photo = np.random.default_rng(0).bytes(PHOTO_BYTES)
    return {**FIELDS, "people": [{"photos": [base64.b64encode(photo).decode()]}], **fields}


def _in_process(settings: Settings, body: Mapping[str, Any]) -> Callable[[], object]:
    stages = flow.Stages(
        faces=NoFaces(settings).detect,
        identity=NoIdentity(settings).encode,
        text=NoText(settings).encode,
        denoise=NoDenoise(settings).denoise,
    )
    store, request = ImageStore(memory_objects(Settings())), Request.model_validate(body)
    return lambda: flow.generate(request, stages, store)


def _over_http(client: httpx.Client, body: Mapping[str, Any]) -> None:
    answer = _post(client, json=body)
    client.get(answer.json()["images"][0]["url"]).raise_for_status()


def _picture(client: httpx.Client, body: Mapping[str, Any]) -> None:
    _post(client, json=body, headers={"accept": "image/png"})


def _post(client: httpx.Client, path: str = PATH, **options: Any) -> httpx.Response:
    return client.post(path, **options).raise_for_status()


def _triples(
    alone: Callable[[], object], served: Callable[[], object], runs: int
) -> Sequence[tuple[float, float, float]]:
    return [(seconds(alone), seconds(served), seconds(alone)) for _ in range(runs + 2)][2:]


def _difference(runs: Sequence[tuple[float, float, float]]) -> float:
    """Milliseconds that b takes more than the mean of the two a's around it, as the median over the runs."""
    return MILLISECONDS * statistics.median(b - (before + after) / 2 for before, b, after in runs)

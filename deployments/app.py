"""build(): the deployments, their names and options, and how they are bound. The only wiring.

The options here suit one machine without a GPU. serve_config.yaml has those of a cluster, per deployment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve import Application

from deployments import denoiser, parallel, stages
from deployments.board import Board
from deployments.ingress import Ingress
from pipeline.faces import FaceDetector
from pipeline.identities import models_in_use
from pipeline.identity import IdentityEncoder
from pipeline.objects import Objects
from pipeline.settings import Settings
from pipeline.store import open_objects
from pipeline.text import TextEncoder

# Shares of one GPU: together they fill it, and no second FluxDenoiser fits beside the first.
GPU_SHARES = {"IdentityEncoder": 0.1, "TextEncoder": 0.3, "FluxDenoiser": 0.6}
EVENT_SECONDS = 600.0  # for which the events of a job can be had after the last of them
SHUTDOWN_MARGIN = 30  # seconds beyond the longest request, so that a rollout loses none


class AppArgs(Settings):
    """What `args` in serve_config.yaml may say: the settings, and nothing else."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What is loaded in which deployment; tests put their own here."""

    faces: Callable[[Settings], Any] = FaceDetector.load
    identity: Callable[[Settings], Any] = IdentityEncoder.load
    text: Callable[[Settings], Any] = TextEncoder.load
    denoise: Callable[[Settings], Any] = parallel.load
    objects: Callable[[Settings], Objects] = lambda settings: open_objects(settings.store)
    models: Callable[[Settings], Mapping[str, str]] = models_in_use


def build(args: AppArgs) -> Application:
    """The application, from settings; Serve calls it with `args` of serve_config.yaml."""
    return wire(args)


def wire(
    settings: Settings, parts: Parts | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Application:
    """The application from given parts; `overrides` are Serve options by deployment, as in serve_config.yaml."""
    parts = parts or Parts()
    options = {name: {**values, **(overrides or {}).get(name, {})} for name, values in defaults(settings).items()}

    denoiser_options = options["FluxDenoiser"]
    options["FluxDenoiser"] = {**parallel.bundles(settings, denoiser_options["ray_actor_options"]), **denoiser_options}

    def deploy(kind: type[stages.Replica], load: Callable[[Settings], Any]) -> Application:
        return serve.deployment(name=kind.__name__, **options[kind.__name__])(kind).bind(settings, load)

    handles = {
        "FaceDetector": deploy(stages.FaceDetector, parts.faces),
        "IdentityEncoder": deploy(stages.IdentityEncoder, parts.identity),
        "TextEncoder": deploy(stages.TextEncoder, parts.text),
        "FluxDenoiser": deploy(denoiser.FluxDenoiser, parts.denoise),
    }
    board = serve.deployment(name="Board", **options["Board"])(Board).bind(EVENT_SECONDS)
    ingress = serve.ingress()(Ingress)
    return serve.deployment(name="Ingress", **options["Ingress"])(ingress).bind(
        settings, handles, board, parts.objects, parts.models
    )


def defaults(settings: Settings) -> dict[str, dict[str, Any]]:
    """Serve options by deployment, for one machine without a GPU."""
    shared = {
        # Serve counts what is still being routed as queued, so a queue needs room for a burst.
        "max_queued_requests": 32,
        "backpressure_config": {"status_code": 429, "retry_after_s": settings.limits.retry_after_seconds},
        "graceful_shutdown_timeout_s": settings.limits.request_seconds + SHUTDOWN_MARGIN,
        "max_constructor_retry_count": 3,  # a missing model file is not there at the twentieth try either
        "ray_actor_options": {"num_cpus": 0.2, "num_gpus": 0},
    }
    return {
        # One, as all have to meet in it; whoever watches a job has a call open there.
        "Board": {
            **shared,
            "max_ongoing_requests": 10_000,
            "max_queued_requests": 900,
        },
        # Far more than `limits.max_requests`: the API itself refuses beyond that, as a problem, and goes on to answer
        # health checks and reads.
        "Ingress": {**shared, "max_ongoing_requests": 16 * settings.limits.max_requests},
        "FaceDetector": {**shared, "max_ongoing_requests": stages.FACES_AT_ONCE},
        # A GPU stage is busy with one call.
        "IdentityEncoder": {**shared, "max_ongoing_requests": 2},
        "TextEncoder": {**shared, "max_ongoing_requests": 2},
        # The engine's own bound, so that none of them is refused after it was routed here.
        "FluxDenoiser": {**shared, "max_ongoing_requests": settings.engine.max_jobs},
    }

"""The whole service on this machine, on a Ray cluster of its own; other Ray clusters are let alone."""

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.errors import SettingsInvalid
from pipeline.settings import Settings

if TYPE_CHECKING:
    from deployments.app import Parts

APPLICATION = "pulid"
PROXY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy:middlewares"}  # the images set it too


@contextmanager
def running(
    settings: Settings,
    host: str,
    port: int,
    parts: "Callable[[], Parts] | None" = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[str]:
    """The application, as an address to send requests to; in the end all of it is stopped.

    `parts` makes other stages than the preset's, for benchmarks; it is called once Ray may be imported. `overrides`:
    Serve options by deployment, as in deployments.app.wire.
    """
    # A token of its own, so that no other user of this machine can drive the cluster; all set before Ray reads it.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_token(), RAY_USAGE_STATS_ENABLED="0", **PROXY)
    import ray
    from ray import serve

    from deployments.app import GPU_SHARES, wire

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Under /tmp, as the names of sockets in it have a limit.
    folder = tempfile.mkdtemp(prefix="pulid-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        _start_ray(folder)
        gpu = settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1  # type: ignore[no-untyped-call]
        shares = {
            name: {"ray_actor_options": {"num_cpus": 0.2, "num_gpus": share}} for name, share in GPU_SHARES.items()
        }
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        serve.run(wire(settings, parts and parts(), {**(shares if gpu else {}), **(overrides or {})}), name=APPLICATION)
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _token() -> str:
    """One for the whole process, as Ray reads it only once."""
    return secrets.token_hex(32)


def _start_ray(folder: str) -> None:
    import ray

    for last in (False, True):
        try:
            ray.init(
                "local", _temp_dir=folder, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
            )
            return
        except Exception as error:  # Ray raises nothing more exact
            ray.shutdown()
            # Ray gives a node 30 s to start, which cannot be set and which a busy machine exceeds.
            if last or "timed out during startup" not in str(error):
                raise


def check(settings: Settings) -> None:
    """What would otherwise fail in a replica, after a while and with Ray's words around it; raises PipelineError."""
    from pipeline import weights
    from pipeline.store import open_store

    open_store(settings.store).check()
    files = weights.locate(settings)
    for spec in files.preset.specs:
        if spec.draws:
            files.path(spec.role)


def check_port(host: str, port: int) -> None:
    """Whether the address can be listened on; raises SettingsInvalid."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingsInvalid(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose a --port."
            ) from error


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Fixtures that several test files share."""

import os
import shutil
import tempfile
from contextlib import contextmanager

import pytest

# Nothing here may start a Ray by itself, as the threads of Serve's handles do that outlive the Ray they belong to.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"


@contextmanager
def _own_ray():
    """A folder for a Ray of our own, and the environment in which nothing else on the machine is touched."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: names of sockets below it have a limit
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0")
    try:
        yield folder
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _started(start, give_up=lambda: None):
    """Call `start` until it succeeds, three times more at most; `give_up` clears away what failed.

    Ray gives a node 30 s to start, which cannot be set and which a busy machine exceeds.
    """
    for left in (3, 2, 1, 0):
        try:
            start()
            return
        except Exception as error:  # Ray raises nothing more exact
            if left == 0 or "timed out during startup" not in str(error):
                raise
            give_up()


def _end_handles():
    """Serve's handles in this process have threads that would go on to report to a controller that is no more."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        client.shutdown_cached_handles()


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """The folder of a complete miniature that nobody has trained (tests/untrained.py)."""
    from tests.untrained import write

    return write(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def s3_endpoint():
    """An S3 server of our own, and credentials for it in the environment."""
    from tests import s3

    with pytest.MonkeyPatch.context() as environment, s3.s3_server() as endpoint:
        for name, value in s3.CREDENTIALS.items():
            environment.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            environment.delenv(name, raising=False)
        yield endpoint


@pytest.fixture(scope="module")
def ray_here():
    """A Ray of our own in this process, with four CPUs."""
    with _own_ray() as folder:
        import ray

        options = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False, "_temp_dir": folder}
        try:
            _started(lambda: ray.init(address="local", **options), ray.shutdown)
            yield
        finally:
            _end_handles()
            ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster():
    """Two local Ray nodes: one with only CPUs (label pool=cpu), one with a pretended GPU (label pool=gpu).

    They have their own folder and ports, and no dashboard; nothing else on the machine is touched.
    """
    with _own_ray():
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        cpu = {"num_cpus": 8, "num_gpus": 0, "labels": {"pool": "cpu"}, "include_dashboard": False}
        gpu = {"num_cpus": 8, "num_gpus": 1, "labels": {"pool": "gpu"}}
        try:
            for options in (cpu, gpu):
                _started(lambda options=options: cluster.add_node(**options))
            _started(lambda: ray.init(address=cluster.address, log_to_driver=False), ray.shutdown)
            yield {node["Labels"]["pool"]: node["NodeID"] for node in ray.nodes()}
        finally:
            _end_handles()
            ray.shutdown()
            cluster.shutdown()

"""Fixtures that several test files share."""

import os
import shutil
import tempfile

import pytest


def _add(cluster, **options):
    for left in (2, 1, 0):
        try:
            cluster.add_node(**options)
            return
        except Exception as error:  # Ray raises nothing more exact
            # Ray gives a node 30 s to start, which cannot be set and which a busy machine exceeds.
            if left == 0 or "timed out during startup" not in str(error):
                raise


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """The folder of a complete miniature that nobody has trained (tests/untrained.py)."""
    from tests.untrained import write

    return write(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def ray_cluster():
    """Two local Ray nodes: one with only CPUs (label pool=cpu), one with a pretended GPU (label pool=gpu).

    They have their own folder and ports, and no dashboard; nothing else on the machine is touched.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: names of sockets below it have a limit
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        _add(cluster, num_cpus=8, num_gpus=0, labels={"pool": "cpu"}, include_dashboard=False)
        _add(cluster, num_cpus=8, num_gpus=1, labels={"pool": "gpu"})
        ray.init(address=cluster.address, log_to_driver=False)
        yield {node["Labels"]["pool"]: node["NodeID"] for node in ray.nodes()}
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)

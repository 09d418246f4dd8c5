"""Several GPUs for one FluxDenoiser replica: the bundles of its placement group, one rank each.

The replica itself is rank 0, in the first bundle. In each other bundle it starts an actor, which holds the same FLUX,
does what rank 0 announces (pipeline/context_parallel.py), and ends with the replica. Where one fails its process ends,
by which the replica becomes unhealthy and is replaced, all ranks with it.
"""

import logging
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.problems import unforeseen
from pipeline import denoise
from pipeline.errors import SettingsInvalid
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.context_parallel import LeadingFlux
    from pipeline.models.flux import IdentityFlux

log = logging.getLogger(__name__)
LoadFlux = Callable[[Settings], "IdentityFlux"]


def load(settings: Settings) -> denoise.FluxDenoiser:
    """The denoiser of a replica, on as many GPUs as are set. Raises WeightsError, SettingsInvalid."""
    if settings.acceleration.context_parallel == 1:
        return denoise.FluxDenoiser.load(settings)
    return denoise.FluxDenoiser.load(settings, around=Ranks(settings, denoise.load_flux).lead)


def bundles(settings: Settings, actor: Mapping[str, float]) -> dict[str, Any]:
    """Serve options of a FluxDenoiser each of whose ranks takes what `actor` (num_cpus, num_gpus) says, if several."""
    ranks = settings.acceleration.context_parallel
    if ranks == 1:
        return {}
    wanted = {"CPU": actor.get("num_cpus", 1), "GPU": actor.get("num_gpus", 0)}
    bundle = {name: amount for name, amount in wanted.items() if amount}
    # On one node: attention exchanges all its tokens twice in every block.
    return {"placement_group_bundles": [bundle] * ranks, "placement_group_strategy": "STRICT_PACK"}


class Rank:
    """Another GPU's FLUX; an actor."""

    def __init__(self, settings: Settings, load_flux: LoadFlux) -> None:
        from pipeline import acceleration

        self._settings = settings
        self._flux = load_flux(settings)
        acceleration.apply(self._flux, None, settings)

    def ready(self) -> None:
        """Returns once FLUX is loaded; raises what stopped that."""

    def follow(self, rank: int, address: str) -> int:
        """Work for rank 0 until it closes; how many identities were left then. Where that fails the process ends."""
        from pipeline import checkpoints, context_parallel

        try:
            ranks, device = self._settings.acceleration.context_parallel, checkpoints.device(self._settings)
            return context_parallel.follow(context_parallel.Share(self._flux, rank, ranks, address, device))
        except BaseException as error:
            unforeseen(error, f"rank {rank} of a FluxDenoiser")
            os._exit(1)  # rank 0 waits for this rank's share: only its connections, closing, tell that there is none


class Ranks:
    """The other ranks of the replica that makes it; they load FLUX while the replica loads its own."""

    def __init__(self, settings: Settings, load_flux: LoadFlux) -> None:
        """Raises SettingsInvalid where the replica has no bundle for each rank."""
        wanted, group = settings.acceleration.context_parallel, get_current_placement_group()
        if group is None or group.bundle_count < wanted:
            raise SettingsInvalid(
                f"PULID_ACCELERATION__CONTEXT_PARALLEL is {wanted}: set placement_group_bundles of the FluxDenoiser to "
                f"{wanted} bundles of one GPU each, or it to 1."
            )
        self._settings = settings
        self._actors: list[Any] = []
        for index in range(1, wanted):
            bundle = group.bundle_specs[index]
            options: dict[str, Any] = {
                "num_cpus": bundle.get("CPU", 0),
                "num_gpus": bundle.get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            }
            self._actors.append(ray.remote(Rank).options(**options).remote(settings, load_flux))

    def lead(self, flux: "IdentityFlux") -> Any:
        """The replica's own FLUX as rank 0, once all others are ready; raises what stopped them."""
        from pipeline import checkpoints, context_parallel

        ray.get([actor.ready.remote() for actor in self._actors])
        address = f"{_own_address()}:{_free_port()}"
        self.running = [actor.follow.remote(rank, address) for rank, actor in enumerate(self._actors, start=1)]
        ranks, device = self._settings.acceleration.context_parallel, checkpoints.device(self._settings)
        leading = context_parallel.LeadingFlux(context_parallel.Share(flux, 0, ranks, address, device), others=self)
        for rank, running in enumerate(self.running, start=1):
            running.future().add_done_callback(partial(_ended, leading, rank))
        return leading


def _ended(leading: "LeadingFlux", rank: int, running: "Future[int]") -> None:
    """Also where no call is under way in which rank 0 would notice."""
    error = running.exception()
    if error is not None:  # else it was closed
        log.error("rank %d of a FluxDenoiser has ended: %s", rank, type(error).__name__)
        leading.lose()


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

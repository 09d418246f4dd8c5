"""Two ranks on two processes of this machine (gloo): what several GPUs would compute of one picture."""

import os
import signal
import time

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments import parallel
from pipeline.acceleration import compile_flux
from pipeline.errors import PipelineError, SettingsInvalid, WorkerUnavailable
from pipeline.models.flux import IdentityFlux, IdentityRow
from pipeline.models.sampling import image_ids
from pipeline.settings import Settings
from tests import small

SETTINGS = Settings(device="cpu", acceleration={"context_parallel": 2})
# rows and columns of image tokens, text tokens, whether people have masks
PASSES = ((4, 4, 6, False), (3, 5, 5, True), (4, 4, 6, True))


def plain_flux() -> IdentityFlux:
    return IdentityFlux(small.transformer(), small.cross_attentions(), modulation="table")


def load_flux(settings: Settings) -> IdentityFlux:
    """A rank's: compiled too, as a share may be."""
    flux = plain_flux()
    compile_flux(flux, "regional", backend="eager")
    return flux


def answers(flux) -> list[torch.Tensor]:
    """What a FLUX predicts for even and uneven lengths, two rows, and people who come and go."""
    random, found = torch.Generator().manual_seed(0), []
    with torch.inference_mode():
        for rows, columns, length, masked in PASSES:
            latents = torch.randn(2, rows * columns, 64, generator=random)
            text, pooled = torch.randn(2, length, 24, generator=random), torch.randn(1, 20, generator=random)
            guidance = torch.tensor([4.0, 3.0])
            conditioning = flux.conditioning(torch.tensor([0.7, 0.3]), guidance[:1], pooled)
            people = [
                IdentityRow(
                    row,
                    flux.prepare(torch.randn(1, 32, 32, generator=random)),
                    torch.full((1, 1, 1), 0.8),
                    torch.rand(1, rows * columns, 1, generator=random) if masked else None,
                )
                for row in (0, 1, 1)
            ]
            times, ids = torch.tensor([0.7, 0.3]), image_ids(rows, columns)
            found.append(flux.predict(latents, times, guidance, text, conditioning, ids, people))
    return found


class Raising(IdentityFlux):
    def predict(self, *inputs):
        raise torch.OutOfMemoryError("a secret")


class Killed(IdentityFlux):
    def predict(self, *inputs):
        os.kill(os.getpid(), signal.SIGKILL)


class Unprepared(IdentityFlux):
    def prepare(self, tokens):
        raise torch.OutOfMemoryError("a secret")


def loader(kind: type[IdentityFlux]):
    return lambda settings: kind(small.transformer(), small.cross_attentions(), modulation="table")


class Replica:
    """Stands where a FluxDenoiser's replica does: an actor in the first bundle of a placement group."""

    def answers(self) -> list[torch.Tensor]:
        ranks = parallel.Ranks(SETTINGS, load_flux)
        leading = ranks.lead(load_flux(SETTINGS))
        found = answers(leading)
        leading.close()
        assert ray.get(ranks.running) == [0]  # identities left with the other rank
        return found

    def loses(self, ours: type[IdentityFlux], theirs: type[IdentityFlux]) -> tuple[float, list[Exception]]:
        """Seconds until the first pass has failed, and what it, a second one and the health check raised."""
        ranks = parallel.Ranks(SETTINGS, loader(theirs))
        leading = ranks.lead(loader(ours)(SETTINGS))
        raised, ended = [], [time.monotonic()]
        for call in (lambda: answers(leading), lambda: answers(leading), leading.check):
            try:
                call()
            except (RuntimeError, PipelineError) as error:
                raised.append(error)
            ended.append(time.monotonic())
        return ended[1] - ended[0], raised

    def loses_while_idle(self) -> str:
        """What the health check raises when the other rank has ended between two passes."""
        ranks = parallel.Ranks(SETTINGS, load_flux)
        leading = ranks.lead(load_flux(SETTINGS))
        ray.kill(ranks._actors[0])
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            try:
                leading.check()
            except WorkerUnavailable as error:
                return str(error)
        return "nothing"

    def goes_on(self) -> bool:
        """Whether the ranks draw on after rank 0 could not prepare an identity."""
        ranks = parallel.Ranks(SETTINGS, load_flux)
        leading = ranks.lead(loader(Unprepared)(SETTINGS))
        with pytest.raises(torch.OutOfMemoryError):
            leading.prepare(torch.zeros(1, 32, 32))
        leading.check()
        leading.close()
        return ray.get(ranks.running) == [0]


def in_a_group(bundles: int, call: str = "answers", *arguments):
    """What a replica in a placement group of so many bundles answers."""
    group = placement_group([{"CPU": 1}] * bundles, strategy="STRICT_PACK")
    try:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        replica = ray.remote(Replica).options(num_cpus=1, scheduling_strategy=strategy).remote()
        return ray.get(getattr(replica, call).remote(*arguments), timeout=120)
    finally:
        remove_placement_group(group)


def test_two_ranks_draw_what_one_draws(ray_here) -> None:
    """Even and uneven shares of the tokens, masks included, equal one process's passes; no identity is left behind."""
    for ours, expected in zip(in_a_group(2), answers(plain_flux()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Raising, Killed])
def test_a_rank_that_fails_is_noticed(ray_here, kind) -> None:
    """Whether the other rank raises or is killed in a pass: rank 0 fails within seconds, and never tries again."""
    seconds, (first, *later) = in_a_group(2, "loses", IdentityFlux, kind)
    assert seconds < 20
    assert isinstance(first, RuntimeError)
    assert [type(error) for error in later] == [WorkerUnavailable] * 2


def test_a_rank_that_ends_between_two_passes_is_noticed(ray_here) -> None:
    """The health check fails before anybody asks for a picture."""
    assert "lost each other" in in_a_group(2, "loses_while_idle")


def test_rank_0_never_goes_on_out_of_step(ray_here) -> None:
    """Where it runs out of memory in a pass it says which setting to lower, and then that its group is of no use."""
    _, (first, *later) = in_a_group(2, "loses", Raising, IdentityFlux)
    assert (type(first), "MAX_ROWS" in str(first)) == (SettingsInvalid, True)
    assert [type(error) for error in later] == [WorkerUnavailable] * 2


def test_an_identity_that_cannot_be_prepared_costs_nobody_else(ray_here) -> None:
    """No rank waits for another in it: the group goes on, and the others forget that identity."""
    assert in_a_group(2, "goes_on")


def test_a_replica_without_a_bundle_for_each_rank_is_refused(ray_here) -> None:
    """It says which option of the deployment to set."""
    with pytest.raises(SettingsInvalid, match="placement_group_bundles"):
        in_a_group(1)


def test_serve_options() -> None:
    """One rank needs no placement group; two need two bundles on one node."""
    assert parallel.bundles(Settings(), {"num_gpus": 1}) == {}
    options = parallel.bundles(SETTINGS, {"num_cpus": 0.2, "num_gpus": 0.6})
    assert options["placement_group_bundles"] == [{"CPU": 0.2, "GPU": 0.6}] * 2
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert parallel.bundles(SETTINGS, {"num_cpus": 0.2, "num_gpus": 0})["placement_group_bundles"] == [{"CPU": 0.2}] * 2

"""The miniature's training, all of it, a few steps a stage."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from pipeline import flow
from pipeline.faces import Face, FaceBox, Faces
from pipeline.miniature import configs
from pipeline.miniature.people import person
from pipeline.miniature.scenes import scene
from pipeline.miniature.world import draw
from pipeline.models.sampling import pack
from pipeline.request import Person, Request
from pipeline.settings import Settings
from pipeline.trace import Trace
from pipeline.training.miniature import build, flux
from pipeline.training.miniature.data import face_of, face_share, importance, number_weights
from pipeline.training.miniature.idformer import IdformerPlan
from pipeline.training.miniature.loop import Loop, LoopPlan, generator, matrices
from pipeline.training.miniature.plan import FULL, QUICK


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    work, weights = folder / "work", folder / "weights"
    work.mkdir()
    weights.mkdir()
    return work, weights, build.run_all(work, weights, QUICK)


def test_every_stage_runs_and_tells_its_figures(built):
    """From nothing to a whole miniature: every stage of the table leaves finite figures and its seconds."""
    work, _, figures = built
    assert figures.keys() == {stage.name for stage in build.STAGES}
    for name, values in figures.items():
        assert values[f"{name}_seconds"] > 0
        assert all(math.isfinite(value) for value in values.values())
    assert build.remembered(work, QUICK).keys() == figures.keys()


def exact_faces(seed):
    """The face of a drawn person from the drawing's own points and labels: a detector of 30 steps would find none."""
    made = draw(person(seed), scene(seed))
    embedding = np.random.default_rng(seed).standard_normal(512).astype(np.float32)
    face = Face(embedding, face_of(made), made.landmarks, FaceBox(0, tuple(made.box.tolist()), 1.0))
    return lambda person, index, tenant: Faces((face,), Trace({}, {}))


def test_what_was_built_draws_a_picture(built):
    """The files load through production's loaders; a picture with an identity differs from one without."""
    _, weights, _ = built
    stages = flow.load_stages(Settings(preset="miniature", miniature_dir=weights, device="cpu"))
    stages = dataclasses.replace(stages, faces=exact_faces(1))
    alone = Request(prompt="a person in the snow", width=256, height=256, num_steps=2, seed=1)
    somebody = alone.model_copy(update={"people": (Person(photos=["AAAA"], id_weight=3.0),)})
    (without,), (with_person,) = (flow.chain(request, stages) for request in (alone, somebody))
    assert (without.width, without.height) == (256, 256)
    assert {name.split("/")[0] for name in with_person.trace.models} >= {
        "flux",
        "vae",
        "pulid",
        "t5",
        "clip",
        "eva_clip",
    }
    assert with_person.data != without.data


def test_a_stage_that_is_done_is_not_run_again(built):
    """A second run finds every stage done; a changed part of the plan undoes its stage and those that read from it."""
    work, _, figures = built
    assert list(build.ready(set(build.remembered(work, QUICK)), set())) == []
    other = dataclasses.replace(QUICK, eva=dataclasses.replace(QUICK.eva, measured=7))
    undone = figures.keys() - build.remembered(work, other).keys()
    assert undone == {"eva", "idformer", "flow", "identity", "alignment"}


def test_another_plan_trains_anew(built, tmp_path):
    """With a changed plan a stage does not go on from what it saved: its weights differ; readers are undone too."""
    work, weights, _ = built
    copied = tmp_path / "work"
    shutil.copytree(work, copied)
    before = (copied / "idformer.safetensors").read_bytes()
    other = dataclasses.replace(QUICK, idformer=IdformerPlan(dataclasses.replace(QUICK.idformer.loop, seed=5)))
    build.run("idformer", copied, weights, other)
    assert (copied / "idformer.safetensors").read_bytes() != before
    assert "flow" not in build.remembered(copied, other)


def test_stages_begin_when_what_they_need_is_done():
    """Nothing begins before its needs, nothing twice, and in the end nothing is left."""
    done: set[str] = set()
    while stages := list(build.ready(done, set())):
        assert all(set(stage.needs) <= done for stage in stages)
        assert stages[0].name not in {stage.name for stage in build.ready(done, {stages[0].name})}
        done.add(stages[0].name)
    assert done == {stage.name for stage in build.STAGES}


class Noisy(nn.Module):
    """A convolution and a matrix with a target that depends on the step."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(3, 2)

    def loss_at(self, step):
        x = torch.randn(4, 2, 5, 5, generator=generator(3, step))
        return (self.linear(self.conv(x).mean(dim=(2, 3))) - x.mean(dim=(2, 3))).square().mean()


def trained(path, steps_first=None):
    plan = LoopPlan(steps=8, batch=4, lr=1e-2, muon_lr=1e-2, warm_up=2, save_every=3)
    torch.manual_seed(0)
    module = Noisy()

    def loss_at(step):
        if step == steps_first:
            raise KeyboardInterrupt
        return module.loss_at(step)

    return Loop(module, plan, path, matrices([module])).run(loss_at)


def test_a_loop_that_was_cut_ends_as_if_it_had_not_been(tmp_path):
    """Cut at step 5, taken up from what was saved at step 3: every averaged weight is the same in every bit."""
    whole = trained(tmp_path / "whole" / "c.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut" / "c.pt", steps_first=5)
    again = trained(tmp_path / "cut" / "c.pt")
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_moves_convolutions_through_a_flat_view():
    """A convolution's own weight changes although Muon is given a matrix: they share their memory."""
    torch.manual_seed(0)
    start = Noisy().conv.weight.detach().clone()
    torch.manual_seed(0)
    module = Noisy()
    Loop(module, LoopPlan(steps=1, batch=4, lr=0.0, muon_lr=1e-2, warm_up=1), None, matrices([module])).run(
        module.loss_at
    )
    assert not torch.equal(module.conv.weight, start)


def test_rates_rise_stay_and_fall():
    """The learning rate rises over the warm-up, stays until `flat`, and ends near zero."""
    plan = LoopPlan(steps=100, batch=1, lr=1.0, warm_up=10, flat=0.5)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(10) == plan.rate(50) == 1.0
    assert plan.rate(75) == pytest.approx(0.5)
    assert plan.rate(99) == pytest.approx(0.02)


def test_the_share_of_the_face_is_where_the_face_is():
    """Tokens in the middle of a drawing show the person, those in the upper corners do not."""
    share = face_share(draw(person(1), scene(1, x=0.0, y=0.0, hat="none")).labels).reshape(8, 8)
    assert share[4, 4] > 0.9
    assert share[0, 0] == share[0, 7] == 0


def test_a_channel_counts_as_much_as_it_is_seen():
    """One that the decoder does not read counts nothing, and one that it reads tenfold the most."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**configs.VAE).eval()
    with torch.no_grad():
        vae.decoder.conv_in.weight[:, 3] = 0
        vae.decoder.conv_in.weight[:, 5] *= 10
    found = importance(vae, np.random.default_rng(0).standard_normal((2, 16, 16, 16), np.float32))
    assert found.mean() == pytest.approx(1)
    assert (found[3], found.argmax()) == (0, 5)


def test_the_numbers_of_a_token_have_their_channels_importance(tmp_path):
    """Latents that hold their channel's importance everywhere are, as tokens, the weights of the flow loss."""
    (tmp_path / "data").mkdir()
    channels = np.arange(16, dtype=np.float32)
    np.save(tmp_path / "data" / "importance.npy", channels)
    tokens = pack(torch.from_numpy(channels)[None, :, None, None].expand(1, 16, 16, 16))
    assert torch.equal(tokens, number_weights(tmp_path).expand(1, 64, 64))


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    """The forward pass is then the network's own; so it is where the plan asks for no compiling."""
    model = flux.build()
    assert flux._prepared(model, QUICK.flux) is model
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert flux._prepared(model, FULL.flux) is model

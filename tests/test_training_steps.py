"""The training as a whole: what it moves, what it does not, and what its parts do to each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import SettingsInvalid
from pipeline.models.flux import IdentityFlux
from pipeline.models.sizes import MINIATURE
from pipeline.training.config import CONTRAST_PROMPTS, ID_PROMPTS, TrainingConfig
from pipeline.training.draws import Draws
from pipeline.training.networks import Networks, new_pulid, save_pulid
from pipeline.training.objective import Objective
from pipeline.training.trainer import Trainer
from tests import small
from tests import training as toy


def _parts(networks: Networks) -> dict[str, torch.nn.Module]:
    parts = {"flux": networks.flux, "vae": networks.vae, "id": networks.idformer, "recogniser": networks.recogniser}
    return {name: part for name, part in parts.items() if part is not None}


def test_a_step_moves_idformer_and_cross_attentions_and_nothing_else():
    """All three losses at once: every trained tensor moves, every other one keeps its bits and has no gradient."""
    trainer = toy.trainer()
    trained = {id(weight) for weight in trainer.weights.values()}
    everything = [weight for part in _parts(trainer.networks).values() for weight in part.parameters()]
    before = [weight.detach().clone() for weight in everything]
    trainer.run(2)
    for weight, old in zip(everything, before, strict=True):
        assert torch.equal(weight, old) != (id(weight) in trained)
        assert (weight.grad is not None) == (id(weight) in trained)
    names = {name.split(".")[0] for name in trainer.weights}
    assert names == {"pulid_encoder", "pulid_ca"}
    assert len(trained) == len(list(trainer.networks.idformer.parameters())) + 4 * 7


@pytest.mark.parametrize(
    "forms", [{}, {"id_form": "one_step", "align_form": "noisy"}, {"gradient_checkpointing": True}, {"autocast": True}]
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # FLUX in float32 under autocast
def test_every_loss_reaches_every_trained_tensor(forms: dict[str, object]):
    """Each term alone gives a gradient to the identity tokens and to all cross-attentions, in every form.

    But for the alignment and the last cross-attention: in so short a FLUX no block reads what it has added.
    """
    trainer = toy.trainer(toy.config(id_dropout=0.0, **forms))
    batch = trainer.batch()
    objective = Objective(trainer.networks, trainer.config, toy.prompts(1, 1), toy.prompts(3, 2))
    tokens = objective.identity_tokens(batch).detach().requires_grad_()
    last = len(trainer.networks.cross_attentions()) - 1
    seen = []
    for term in objective.terms(batch, tokens, Draws(0, 0, range(4)), workers=1):
        weights = {name: weight for name, weight in trainer.weights.items() if name.startswith("pulid_ca.")}
        gradients = torch.autograd.grad(term.loss, [tokens, *weights.values()], allow_unused=True)
        without = [name for name, gradient in zip(weights, gradients[1:], strict=True) if gradient is None]
        assert all(name.startswith(f"pulid_ca.{last}.") for name in without)
        assert (len(without) == 7) == ("layout" in term.figures)
        assert gradients[0] is not None
        assert gradients[0][: term.count].abs().sum(dim=(1, 2)).min() > 0
        seen += list(term.figures)
    assert seen == ["flow", "id", "semantic", "layout"]


def test_stages_add_one_loss_after_the_other():
    """Stage 1 is the flow loss, 2 adds the ID loss, 3 the alignment, each at its own rhythm."""
    names = ({"flow"}, {"flow", "id"}, {"flow", "id", "semantic", "layout"})
    for stage, expected in enumerate(names, start=1):
        figures = toy.trainer(toy.config(stage=stage)).run(1)
        assert set(figures) - {"gradient", "rate", "faces"} == expected
    seen = []
    toy.trainer(toy.config(id_every=2, align_every=3)).run(4, lambda _, figures: seen.append(set(figures)))
    assert ["id" in figures for figures in seen] == [True, False, True, False]
    assert ["layout" in figures for figures in seen] == [True, False, False, True]


def test_pictures_without_a_face_drop_out_of_the_id_loss():
    """The loss is the mean over the faces that were found; without any, it is not there and the step goes on."""

    def first(pixels: torch.Tensor) -> Sequence[np.ndarray | None]:
        return [toy.LANDMARKS if row == 0 else None for row in range(len(pixels))]

    alone = toy.trainer(toy.config(stage=2, id_batch_size=1)).run(1)
    figures = toy.trainer(toy.config(stage=2, id_batch_size=2), locate=first).run(1)
    assert figures["id"] == pytest.approx(alone["id"], rel=1e-5)
    assert figures["faces"] == 0.5
    none = toy.trainer(toy.config(stage=2), locate=lambda pixels: [None] * len(pixels)).run(1)
    assert none["faces"] == 0
    assert "id" not in none


def test_a_dropped_identity_is_nobodys():
    """With every identity dropped, the flow loss is the same whoever is in the picture."""
    trainer = toy.trainer(toy.config(stage=1, id_dropout=1.0))
    strangers = toy.trainer(toy.config(stage=1, id_dropout=1.0))
    batch = strangers.batch()
    others = type(batch)(**{**{n: getattr(batch, n) for n in batch.__slots__}, "embedding": batch.embedding.flip(0)})
    assert trainer.train_step(trainer.batch())["flow"] == strangers.train_step(others)["flow"]


def test_flux_may_be_in_bfloat16():
    """The trained weights stay in float32, move, and every loss is finite."""
    transformer = torch.nn.Module.to(small.transformer(), torch.bfloat16)
    trainer = toy.trainer(flux=IdentityFlux(transformer, small.cross_attentions()))
    before = {name: weight.detach().clone() for name, weight in trainer.weights.items()}
    figures = trainer.run(1)
    assert all(np.isfinite(value) for value in figures.values())
    assert {weight.dtype for weight in trainer.weights.values()} == {torch.float32}
    assert not any(torch.equal(weight, before[name]) for name, weight in trainer.weights.items())


def test_an_untrained_pulid_adds_nothing_and_learns():
    """At first nothing is added to the image; the flow loss on a few pictures then falls."""
    encoder, modules = new_pulid(4, toy.IDFORMER, {"dim": 32, "dim_head": 16, "heads": 2, "kv_dim": 32})
    assert not any(module.to_out.weight.any() for module in modules)
    networks = toy.networks(flux=IdentityFlux(small.transformer(), modules), idformer=encoder)
    settings = toy.config(stage=1, steps=24, batch_size=6, id_dropout=0.0)
    trainer = Trainer(networks, settings, toy.examples(count=6))
    flow: list[float] = []
    trainer.run(24, lambda _, figures: flow.append(figures["flow"]))
    assert sum(flow[-6:]) < 0.9 * sum(flow[:6])


def test_the_mean_of_the_weights_is_kept():
    """Worked out: after two steps with young decays 1/10 and 2/11."""
    trainer = toy.trainer()
    name = "pulid_encoder.proj_out"
    states = [trainer.weights[name].detach().clone()]
    trainer.run(2, lambda *_: states.append(trainer.weights[name].detach().clone()))
    one = states[0] / 10 + states[1] * 9 / 10
    torch.testing.assert_close(trainer.ema.weights[name], one * 2 / 11 + states[2] * 9 / 11)


def test_learning_rates_rise_stay_and_fall():
    """Worked out: 4 steps up, flat to half of 20 steps, in a line to zero."""
    config = TrainingConfig(steps=20, warmup=4, decay_from=0.5)
    assert [config.learning_rate(step) for step in (0, 1, 3, 10, 15, 20)] == [0.25, 0.5, 1, 1, 0.5, 0]


def test_what_is_published_is_the_default():
    """Loss weights, prompts and the fast sampler's steps are the paper's (sections 3.4, 3.5, 4.1 and Table 8)."""
    config = TrainingConfig()
    assert (config.semantic, config.layout, config.lambda_id, config.id_steps) == (0.6, 0.1, 1.0, 4)
    assert ID_PROMPTS == ("portrait, color, cinematic",)
    assert len(set(CONTRAST_PROMPTS)) == 15


def test_parts_that_do_not_fit_are_refused():
    """A stage without what it needs, and batches that cannot be shared out, fail before the first step."""
    with pytest.raises(SettingsInvalid, match="recogniser"):
        toy.trainer(recogniser=None)
    with pytest.raises(SettingsInvalid, match="prompts"):
        Trainer(toy.networks(), toy.config(), toy.examples(), toy.prompts(1, 1))
    with pytest.raises(SettingsInvalid, match="multiples"):
        toy.trainer(toy.config(id_batch_size=1), toy.worker(1, 2))


def test_what_is_trained_is_written_as_pulids_file(tmp_path: Path):
    """The miniature's sizes, official names: the loader of the product takes it."""
    from safetensors.torch import load_file

    encoder, modules = new_pulid(8, MINIATURE.idformer, MINIATURE.cross_attention)
    networks = Networks(IdentityFlux(toy.miniature_transformer(), modules, 1, 2), encoder)
    save_pulid(tmp_path / "pulid.safetensors", networks.trainable())
    state = load_file(tmp_path / "pulid.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert state.keys() == networks.trainable().keys()

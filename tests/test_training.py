"""The parts of the training: losses worked out by hand, attention features, sampling, the face out of a picture."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InternalError
from pipeline.models.alignment import arcface_crop
from pipeline.models.flux import IdentityFlux, IdentityRows
from pipeline.models.sampling import image_ids, schedule, time_shift
from pipeline.training import losses
from pipeline.training.attention import AttentionFeatures, attention_features
from pipeline.training.config import HIGH_NOISE, Times, TrainingConfig
from pipeline.training.crop import face_crops
from pipeline.training.draws import Draws, order
from pipeline.training.optimiser import Optimiser
from pipeline.training.sampling import noisy, one_step_estimate, sample, sample_times
from tests import small

LN3 = math.log(3)


def test_flow_loss_is_the_mean_square_distance_from_noise_minus_latents():
    """Worked out: noise 3 and latents 1 ask for 2; predictions of 1 and 4 are off by 1 and 2."""
    velocity = torch.tensor([[[1.0, 1.0], [4.0, 4.0]]])  # (1, 2 tokens, 2 features)
    noise, latents = torch.full((1, 2, 2), 3.0), torch.ones(1, 2, 2)
    assert losses.flow_loss(velocity, noise, latents).tolist() == [(1 + 4) / 2]
    assert losses.flow_loss(velocity, noise, latents, torch.tensor([[1.0, 3.0]])).tolist() == [(1 * 1 + 3 * 4) / 4]
    assert losses.flow_loss(noise - latents, noise, latents).tolist() == [0]


def test_the_numbers_of_a_token_may_count_differently():
    """Worked out: squares of 1, 9 and 4, 4; the weights take the first and, twice, the last of them."""
    velocity = torch.tensor([[[1.0, 5.0], [4.0, 4.0]]])
    noise, latents = torch.full((1, 2, 2), 3.0), torch.ones(1, 2, 2)
    weights = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert losses.flow_loss(velocity, noise, latents, weights).tolist() == [(1 * 1 + 2 * 4) / 3]
    assert losses.flow_loss(velocity, noise, latents, torch.tensor([[[0.0, 1.0]]])).tolist() == [(9 + 4) / 2]


def test_semantic_alignment_compares_what_each_word_gathers_from_the_picture():
    """Worked out: two image queries, 0 and 1; a key of ln 3 weighs them 1 : 3, a key of 0 evenly."""
    query_id, nothing = torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
    for key, gathered in ((LN3, 3 / 4), (0.0, 1 / 2)):
        loss = losses.semantic_alignment(query_id, nothing, torch.tensor(key).reshape(1, 1, 1, 1))
        assert loss.item() == pytest.approx(gathered**2)
    both = losses.semantic_alignment(query_id, nothing, torch.tensor([LN3, 0.0]).reshape(1, 1, 2, 1))
    assert both.item() == pytest.approx((9 / 16 + 1 / 4) / 2)


def test_semantic_alignment_scales_by_the_root_of_the_head_size():
    """Worked out: of four features one counts; a product of 2 ln 3 over the root of 4 is ln 3."""
    query_id, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 4)
    query_id[0, 0, 1, 0], key[0, 0, 0, 0] = 1, 2 * LN3
    assert losses.semantic_alignment(query_id, torch.zeros(1, 1, 2, 4), key).item() == pytest.approx((3 / 4) ** 2 / 4)


def test_semantic_alignment_does_not_mind_where_something_is():
    """Image tokens that change places answer every word as before; the layout alignment sees it."""
    random = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, tokens, 4, generator=random) for tokens in (6, 3))
    moved = query[:, :, [3, 4, 5, 0, 1, 2]]
    assert losses.semantic_alignment(moved, query, key).item() == pytest.approx(0, abs=1e-12)
    assert losses.layout_alignment(moved, query).item() > 0.1


def test_layout_alignment_is_the_mean_square_distance_place_by_place():
    """Worked out: four queries of which one feature differs, by 2."""
    query_id, query = torch.ones(1, 2, 2, 1), torch.ones(1, 2, 2, 1)
    query_id[0, 1, 0, 0] = 3
    assert losses.layout_alignment(query_id, query).tolist() == [4 / 4]


def test_id_loss_is_one_minus_the_cosine_whatever_the_lengths():
    """Worked out: the same direction, 60 degrees, at right angles, opposite."""
    generated = torch.tensor([[2.0, 0.0], [1.0, math.sqrt(3)], [0.0, 5.0], [-3.0, 0.0]])
    assert losses.id_loss(generated, torch.tensor([[7.0, 0.0]])).tolist() == pytest.approx([0, 0.5, 1, 2])


def test_layers_count_evenly():
    """The mean over layers, sample by sample."""
    assert losses.mean_over_layers([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]).tolist() == [2, 4]


def test_an_exact_velocity_leads_back_to_the_picture_in_one_step():
    """The way from picture to noise is straight."""
    random = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(3, 4, 5, generator=random) for _ in range(2))
    times = torch.tensor([0.1, 0.5, 1.0])
    estimate = one_step_estimate(noisy(latents, noise, times), noise - latents, times)
    torch.testing.assert_close(estimate, latents)


@pytest.mark.parametrize(("gradient_steps", "expected"), [(2, -0.5 - 0.5), (5, -1.0), (1, -0.5), (0, None)])
def test_the_gradient_goes_through_the_last_steps_only(gradient_steps: int, expected: float | None):
    """Worked out: with velocity a x and two half steps from 2, x ends as 2 (1 - a / 2)^2; at a = 1 that is 1/2.

    Both steps give the slope -2 (1 - a / 2) = -1; the last one alone, from x = 1, gives -1/2.
    """
    factor = torch.tensor(1.0, requires_grad=True)
    times = torch.tensor([1.0, 0.5, 0.0])
    end = sample(lambda latents, _: factor * latents, torch.full((1, 1, 1), 2.0), times, gradient_steps)
    assert end.item() == 0.5
    assert end.requires_grad == (expected is not None)
    if expected is not None:
        end.sum().backward()
        assert factor.grad is not None
        assert factor.grad.item() == expected


def test_times_are_a_mixture():
    """Worked out: the first chance chooses, the second is stretched over [low, 1], the normal one goes through."""
    chance, normal = torch.tensor([[0.4, 0.5], [0.6, 0.5]]), torch.tensor([9.0, -1 / 1.2])
    assert sample_times(chance, normal, HIGH_NOISE, 64).tolist() == pytest.approx([0.85, 0.5])


def test_times_without_a_mean_follow_the_official_shift():
    """A shifted schedule and a shifted logit are the same thing."""
    even, shifted = schedule(5, 1024, shift=False)[1:-1], schedule(5, 1024)[1:-1]
    times = sample_times(torch.ones(4, 2), torch.logit(even), Times(), 1024)
    torch.testing.assert_close(times, shifted)
    assert time_shift(1024) == pytest.approx(0.63)


def test_an_order_takes_every_example_once_per_round():
    """Five steps of four are two rounds of ten; each is a permutation, not the same one; the seed decides."""
    taken = [index for step in range(5) for index in order(3, step, 4, 10)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert order(4, 0, 4, 10) != order(3, 0, 4, 10)


def test_a_place_draws_the_same_whoever_asks():
    """Random numbers belong to places of the global batch, not to workers; to steps and purposes, not to calls."""
    whole = Draws(1, 7, range(6)).normal("noise", 3)
    assert torch.equal(Draws(1, 7, range(1, 6, 2)).normal("noise", 3), whole[1::2])
    assert not torch.equal(Draws(1, 8, range(6)).normal("noise", 3), whole)
    assert not torch.equal(Draws(1, 7, range(6)).normal("other", 3), whole)


def test_the_crop_with_gradient_is_the_crop_without():
    """The same pixels as arcface_crop's, but for its rounding to bytes; the gradient stays within the face's place."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    points = np.array([(30, 20), (48, 24), (38, 33), (28, 42), (43, 45)], np.float32)
    pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1).requires_grad_()
    crop = face_crops(pixels, [points])
    as_bytes = (crop[0].detach().permute(1, 2, 0).numpy() + 1) * 127.5
    difference = np.abs(as_bytes - arcface_crop(picture, points))
    assert difference.mean() < 1  # OpenCV places its samples on a grid of 1/32 pixel
    assert difference.max() < 12
    crop.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad[..., 33, 38].abs().min() > 0


def _passes(flux: IdentityFlux, people: list[IdentityRows]) -> tuple[Tensor, AttentionFeatures]:
    random = torch.Generator().manual_seed(8)
    latents, text, pooled = (torch.randn(2, *s, generator=random) for s in ((9, 64), (6, 24), (20,)))
    with attention_features(flux.transformer, text_tokens=6) as features:
        half = torch.tensor([0.5, 0.5])
        velocity = flux(latents, half, 4 * torch.ones(2), text, pooled, image_ids(3, 3), people)
    return velocity, features


def test_features_are_each_blocks_image_queries_and_text_keys():
    """One per block, double blocks first; in the first block, the normed projections of the embedded inputs."""
    flux = IdentityFlux(small.transformer(), small.cross_attentions())
    _, features = _passes(flux, [])
    assert [query.shape for query in features.queries] == [(2, 2, 9, 16)] * 8
    assert [key.shape for key in features.keys] == [(2, 2, 6, 16)] * 8

    random = torch.Generator().manual_seed(8)
    latents, text, pooled = (torch.randn(2, *s, generator=random) for s in ((9, 64), (6, 24), (20,)))
    model = small.transformer()
    block, attention = model.transformer_blocks[0], model.transformer_blocks[0].attn
    moment = model.time_text_embed(torch.full((2,), 500.0), torch.full((2,), 4000.0), pooled)
    image = attention.to_q(block.norm1(model.x_embedder(latents), emb=moment)[0]).unflatten(-1, (2, 16))
    words = attention.add_k_proj(block.norm1_context(model.context_embedder(text), emb=moment)[0]).unflatten(
        -1, (2, 16)
    )
    torch.testing.assert_close(features.queries[0], attention.norm_q(image).transpose(1, 2))
    torch.testing.assert_close(features.keys[0], attention.norm_added_k(words).transpose(1, 2))


def test_recording_changes_nothing_and_leaves_nothing():
    """The prediction is the same to the bit, and no hook stays."""
    flux = IdentityFlux(small.transformer(), small.cross_attentions())
    recorded, _ = _passes(flux, [])
    assert not any(module._forward_hooks for module in flux.modules())
    random = torch.Generator().manual_seed(8)
    latents, text, pooled = (torch.randn(2, *s, generator=random) for s in ((9, 64), (6, 24), (20,)))
    half = torch.tensor([0.5, 0.5])
    assert torch.equal(flux(latents, half, 4 * torch.ones(2), text, pooled, image_ids(3, 3)), recorded)


def test_features_carry_the_gradient_with_and_without_gradient_checkpointing():
    """What the blocks compute twice gives the same gradient as what they keep."""
    gradients = []
    for checkpointing in (False, True):
        flux = IdentityFlux(small.transformer(), small.cross_attentions())
        if checkpointing:
            flux.transformer.enable_gradient_checkpointing()
        tokens = small.uncond().requires_grad_()
        _, features = _passes(flux, [IdentityRows(tokens, torch.ones(1, 1, 1))])
        sum(query.square().sum() for query in features.queries[1:]).backward()
        assert tokens.grad is not None
        gradients.append(tokens.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_a_gradient_that_is_not_finite_ends_the_training_before_it_harms():
    """NaN in one gradient: a typed error that names the step, and no weight has moved."""
    weights = {f"pulid_ca.0.{name}": nn.Parameter(torch.ones(2, 2)) for name in ("one", "other")}
    optimiser = Optimiser(weights, TrainingConfig(warmup=0))
    for value, weight in zip((1.0, math.nan), weights.values(), strict=True):
        weight.grad = torch.full((2, 2), value)
    with pytest.raises(InternalError, match="step 7"):
        optimiser.step(7)
    assert all(torch.equal(weight, torch.ones(2, 2)) for weight in weights.values())

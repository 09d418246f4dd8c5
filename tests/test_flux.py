from dataclasses import replace

import pytest
import torch

from pipeline.models.flux import IdentityFlux, IdentityRow, IdentityRows
from pipeline.models.modulation import modulated_norms
from pipeline.models.sampling import image_ids, schedule
from pipeline.models.step_cache import StepCache
from tests import small


@pytest.fixture(scope="module")
def model() -> IdentityFlux:
    return IdentityFlux(small.transformer(), small.cross_attentions())


def draw(model, people=(), rows=1, seed=0, step_cache=None):
    random = torch.Generator().manual_seed(seed)
    latents, text, pooled = (torch.randn(rows, *shape, generator=random) for shape in ((12, 64), (5, 24), (20,)))
    times, guidance = torch.full((rows,), 0.7), torch.full((rows,), 4.0)
    with torch.no_grad():
        return model.predict(latents, times, guidance, text, pooled, image_ids(3, 4), people, step_cache)


def person(seed, weight=1.0, mask=None, rows=1):
    tokens = torch.randn(rows, 32, small.KV_DIM, generator=torch.Generator().manual_seed(seed))
    return IdentityRows(tokens, torch.as_tensor(weight).reshape(-1, 1, 1), mask)


def test_the_transformer_handed_in_stays_as_it_is():
    """Its keys, blocks and results are those it had before; both share the same weights."""
    transformer = small.transformer()
    keys, blocks = list(transformer.state_dict()), list(transformer.transformer_blocks)
    model = IdentityFlux(transformer, small.cross_attentions())
    assert list(transformer.state_dict()) == keys
    assert all(ours is theirs for ours, theirs in zip(transformer.transformer_blocks, blocks, strict=True))
    assert not hasattr(transformer, "cross_attentions")
    assert model.transformer.transformer_blocks[0].block is blocks[0]


def test_without_people_it_is_plain_flux(model):
    """No people is the stock model's result to the bit."""
    stock = small.transformer()
    random = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(1, *shape, generator=random) for shape in ((12, 64), (5, 24), (20,)))
    with torch.no_grad():
        expected = stock(
            latents, text, pooled, torch.tensor([0.7]), image_ids(3, 4), torch.zeros(5, 3), torch.tensor([4.0])
        ).sample
    assert torch.equal(draw(model), expected)


def test_weight_zero_is_nobody(model):
    """A person of weight 0 changes nothing, to the bit; of weight 1 a lot."""
    assert torch.equal(draw(model, [person(1, 0.0)]), draw(model))
    assert not torch.allclose(draw(model, [person(1)]), draw(model), atol=1e-3)


def test_nothing_is_kept_between_calls(model):
    """After a call with somebody else, a person's result is the same to the bit."""
    first = draw(model, [person(1)])
    draw(model, [person(2)])
    assert torch.equal(draw(model, [person(1)]), first)
    assert torch.equal(draw(model), draw(IdentityFlux(small.transformer(), small.cross_attentions())))


def test_people_are_added_in_parallel(model):
    """The order of people does not matter, as each reads the block's own output."""
    both = draw(model, [person(1), person(2, 0.5)])
    torch.testing.assert_close(draw(model, [person(2, 0.5), person(1)]), both, rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_have_people_of_their_own(model):
    """Rows with different identities and weights in one pass equal the same rows one by one."""
    together = draw(model, [person(1, [1.0, 0.0, 0.3], rows=3)], rows=3)
    random = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(3, *shape, generator=random) for shape in ((12, 64), (5, 24), (20,)))
    tokens = person(1, rows=3).tokens
    for row, weight in enumerate([1.0, 0.0, 0.3]):
        alone = IdentityRows(tokens[row : row + 1], torch.tensor(weight).reshape(1, 1, 1))
        with torch.no_grad():
            expected = model.predict(
                *(latents[row : row + 1], torch.tensor([0.7]), torch.tensor([4.0])),
                *(text[row : row + 1], pooled[row : row + 1], image_ids(3, 4), [alone]),
            )
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_a_mask_limits_where_an_identity_acts(model):
    """A mask of zeros is nobody, of ones is everywhere, and a half mask is neither."""
    ones, half = torch.ones(1, 12, 1), (torch.arange(12) < 6).float().reshape(1, 12, 1)
    assert torch.equal(draw(model, [person(1, mask=ones * 0)]), draw(model))
    assert torch.equal(draw(model, [person(1, mask=ones)]), draw(model, [person(1)]))
    masked = draw(model, [person(1, mask=half)])
    assert not torch.allclose(masked, draw(model), atol=1e-3)
    assert not torch.allclose(masked, draw(model, [person(1)]), atol=1e-3)


def test_a_wrong_number_of_cross_attentions_is_refused():
    """3 double and 5 single blocks take 2 + 2 cross-attentions."""
    with pytest.raises(ValueError, match="take 4"):
        IdentityFlux(small.transformer(), small.cross_attentions()[:3])


def row(model, seed, number=0, weight=1.0, mask=None):
    return IdentityRow(number, model.prepare(person(seed).tokens), torch.full((1, 1, 1), weight), mask)


def test_prepared_people_are_the_people(model):
    """A folded identity gives what its tokens give, with weight and mask, up to rounding."""
    half = (torch.arange(12) < 6).float().reshape(1, 12, 1)
    plain = draw(model, [person(1, 0.7, half), person(2)])
    torch.testing.assert_close(draw(model, [row(model, 1, 0, 0.7, half), row(model, 2)]), plain, rtol=1e-5, atol=1e-5)


def test_prepared_rows_have_people_of_their_own(model):
    """In one pass one row has two people, one has one, one nobody: each is what it would be alone."""
    people = [row(model, 1, 0), row(model, 2, 0, 0.5), row(model, 3, 2, 0.8)]
    together = draw(model, people, rows=3)
    random = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(3, *shape, generator=random) for shape in ((12, 64), (5, 24), (20,)))
    for number in range(3):
        at = slice(number, number + 1)
        alone = [replace(one, row=0) for one in people if one.row == number]
        with torch.no_grad():
            expected = model.predict(
                *(latents[at], torch.tensor([0.7]), torch.tensor([4.0])),
                *(text[at], pooled[at], image_ids(3, 4), alone),
            )
        torch.testing.assert_close(together[at], expected, rtol=1e-5, atol=1e-5)


def test_a_step_cache_keeps_the_identity_inside_its_residual(model):
    """A step that is skipped gives, for the same input, the result of the step before, person and all."""
    cache, runs = StepCache(0.1), []
    count = model.transformer.transformer_blocks[1].block.register_forward_hook(lambda *_: runs.append(1))
    people = [row(model, 1)]
    computed, skipped = draw(model, people, step_cache=cache), draw(model, people, step_cache=cache)
    count.remove()
    assert torch.equal(computed, draw(model, people))
    torch.testing.assert_close(skipped, computed, rtol=1e-4, atol=1e-4)
    assert len(runs) == 1  # the second step really was skipped


def test_a_step_cache_computes_what_has_changed(model):
    """Another input, or a cache that was told to forget, is computed in full; nothing is left on the model."""
    cache = StepCache(0.1)
    draw(model, step_cache=cache)
    assert torch.equal(draw(model, seed=1, step_cache=cache), draw(model, seed=1))
    assert not cache.skipping
    cache.forget()
    assert torch.equal(draw(model, seed=1, step_cache=cache), draw(model, seed=1))
    assert not cache.skipping


@pytest.mark.parametrize("mode", ["table", "host"])
def test_precomputed_modulation_changes_no_bit(model, mode):
    """Rows of the table give what FLUX gives that makes its modulation in every step, with people too."""
    precomputed = IdentityFlux(small.transformer(), small.cross_attentions(), modulation=mode)
    random = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(1, *shape, generator=random) for shape in ((12, 64), (5, 24), (20,)))
    times, guidance = schedule(28, 12)[:-1], torch.tensor([3.5])
    table = precomputed.conditioning(times, guidance, pooled)
    for step in (0, 13, 27):
        inputs = latents, times[step : step + 1], guidance, text
        ours = precomputed.predict(*inputs, table[step : step + 1], image_ids(3, 4), [row(precomputed, 1)])
        assert torch.equal(ours, model.predict(*inputs, pooled, image_ids(3, 4), [row(model, 1)]))


def test_what_makes_the_table_is_not_needed_by_the_steps():
    """A step reads none of the weights that make the table: they may be anywhere."""
    precomputed = IdentityFlux(small.transformer(), small.cross_attentions(), modulation="table")
    stock = small.transformer()
    makers = [stock.time_text_embed, *(norm.linear for norm in modulated_norms(stock))]
    adapters = sum(p.numel() for module in small.cross_attentions() for p in module.parameters())
    needless = sum(parameter.numel() for module in makers for parameter in module.parameters())
    total = sum(parameter.numel() for parameter in stock.parameters())
    assert sum(p.numel() for p in precomputed.transformer.parameters()) == total - needless + adapters

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from pipeline.models.flux import IdentityFlux, IdentityRows
from pipeline.models.sampling import image_ids
from tests import small


@pytest.fixture(scope="module")
def model() -> IdentityFlux:
    return IdentityFlux(small.transformer(), small.cross_attentions())


def draw(model, people=(), rows=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    latents, text, pooled = (torch.randn(rows, *shape, generator=random) for shape in ((12, 64), (5, 24), (20,)))
    times, guidance = torch.full((rows,), 0.7), torch.full((rows,), 4.0)
    with torch.no_grad():
        return model.predict(latents, times, guidance, text, pooled, image_ids(3, 4), people)


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


def test_a_step_cache_keeps_the_identity_inside_its_residual():
    """A step that the first-block cache skips gives, for the same input, the result of the step before."""
    model = IdentityFlux(small.transformer(), small.cross_attentions())
    plain = draw(model, [person(1)])
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    runs = []
    model.transformer.transformer_blocks[1].block.register_forward_hook(lambda *_: runs.append(1))
    with model.transformer.cache_context("row"):
        computed, skipped = draw(model, [person(1)]), draw(model, [person(1)])
    torch.testing.assert_close(computed, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(skipped, plain, rtol=1e-4, atol=1e-4)
    assert len(runs) == 1  # the second step really was skipped

import math

import pytest
import torch

from pipeline.models import sampling


@pytest.mark.parametrize(("tokens", "mu"), [(1024, 0.63), (4032, 1.139167), (4096, 1.15), (9216, 2.016667)])
def test_the_shift_grows_with_the_picture(tokens, mu):
    """The middle of an evenly spaced schedule lands where the official mu for that many tokens puts it."""
    middle = sampling.schedule(2, tokens)[1]
    assert float(middle) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1), abs=1e-5)


def test_a_schedule_runs_from_one_to_zero():
    """Times fall all the way from exactly 1 to exactly 0; without shift they are even."""
    times = sampling.schedule(28, 4032)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    torch.testing.assert_close(sampling.schedule(4, 4032, shift=False), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_packing_is_reversible_and_in_the_official_order():
    """unpack undoes pack; token k is row-major, and its features run channel, row, column."""
    latents = sampling.noise(3, 6, 8)
    tokens = sampling.pack(latents)
    assert tokens.shape == (1, 12, 64)
    assert torch.equal(sampling.unpack(tokens, 3, 4), latents)
    assert torch.equal(tokens[0, 5, 4:8], latents[0, 1, 2:4, 2:4].flatten())


def test_a_seed_is_one_noise():
    """The same seed gives the same noise, another seed another; the largest seed is accepted."""
    assert torch.equal(sampling.noise(7, 4, 4), sampling.noise(7, 4, 4))
    assert not torch.equal(sampling.noise(7, 4, 4), sampling.noise(8, 4, 4))
    assert sampling.noise(2**64 - 1, 4, 4).shape == (1, 16, 4, 4)


def test_image_ids_are_zero_row_column():
    """Token 5 of a 3 x 4 grid is at row 1, column 1."""
    assert sampling.image_ids(3, 4)[5].tolist() == [0, 1, 1]

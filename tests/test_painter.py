"""Rows of one pass: whatever shares it, each is what it would be alone."""

import io
import math
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import checkpoints
from pipeline.caches import Cache
from pipeline.curves import Curves
from pipeline.denoise import FluxDenoiser, draw
from pipeline.drawing import Work
from pipeline.engine import Engine
from pipeline.errors import DeadlineExceeded, PictureInvalid
from pipeline.events import Done, Failed, Previewed, Stepped
from pipeline.models import preview
from pipeline.models.flux import IdentityFlux
from pipeline.painter import FluxPainter
from pipeline.request import Request
from pipeline.settings import AccelerationSettings, EngineSettings, Settings
from tests import small


class AlwaysTogether(Curves):
    """As if more rows cost nothing, where they fit."""

    def seconds(self, shape, rows):
        return 1.0 if math.isfinite(super().seconds(shape, rows)) else math.inf


class Watched:
    """A FLUX of which is seen how many rows each pass has, and how often a picture's conditioning is made.

    With more than `most` rows its memory is too short; it fails in pass number `fails`.
    """

    def __init__(self, flux, most=8, fails=None):
        self.flux, self.most, self.fails = flux, most, fails
        self.rows, self.conditionings, self.held = [], 0, []

    def __getattr__(self, name):
        return getattr(self.flux, name)

    def conditioning(self, times, guidance, pooled):
        self.conditionings += 1
        return self.flux.conditioning(times, guidance, pooled)

    def predict(self, latents, *others, **named):
        assert not [tensor for tensor in self.held if tensor() is not None]  # what has failed holds no memory
        self.rows.append(len(latents))
        if len(latents) > self.most:
            self.held.append(weakref.ref(latents))
            raise torch.OutOfMemoryError("out of memory")
        if len(self.rows) == self.fails:
            raise RuntimeError("a kernel failed")
        return self.flux.predict(latents, *others, **named)


def painting(max_rows=8, curves=None, modulation="live", step_cache=0.0, vae=None, **limits):
    """A painter, and its FLUX, which is watched."""
    flux = Watched(IdentityFlux(small.transformer(), small.cross_attentions(), modulation=modulation), **limits)
    folded = Cache(10**9, lambda identity: identity.nbytes)
    vae = small.vae() if vae is None else vae
    painter = FluxPainter(
        *(flux, vae, small.uncond(), {}, folded, curves or AlwaysTogether()), max_rows=max_rows, step_cache=step_cache
    )
    return painter, flux


@pytest.fixture
def together():
    return painting()


def work(seed, people=(), number=0, **fields) -> Work:
    people = [{"photos": ["AAAA"], **person} for person in people]
    fields = {"prompt": "portrait", "width": 256, "height": 256, "num_steps": 4, "seed": seed} | fields
    request = Request.model_validate({"people": people, **fields})
    identities = tuple(small.identity(seed * 10 + index) for index in range(len(people)))
    negative = small.text(seed + 50) if request.uses_true_cfg else None
    return Work(request, number, small.text(seed), negative, identities)


MIX = [
    work(1),
    work(2, [{}]),
    work(3, [{"id_weight": 0.6, "mask": {"box": [0, 0, 0.5, 1]}}, {"start_step": 2}], guidance_scale=2.0),
    work(4, [{"end_step": 1}], true_cfg=2.5, num_steps=6),
    work(5, [{"id_weight": 0.0}], num_steps=2),
    work(6, [{}], true_cfg=3.0, timestep_to_start_cfg=3),
    work(7, num_outputs=2, number=1),
    work(8, [{"id_weight": 1.4}], num_steps=7, guidance_scale=7.5),
]


class Latents:
    """The painter itself, but what it finishes are latents, before anything is rounded to bytes."""

    def __init__(self, painter):
        self.painter = painter

    def __getattr__(self, name):
        return getattr(self.painter, name)

    def finish(self, drawing):
        return drawing.latents


def latents(painter, works, max_rows, arrivals=0):
    """What an engine makes of works, of which each comes `arrivals` steps after the one before."""
    painter = Latents(painter)
    engine, made = Engine(painter, AlwaysTogether(), max_rows=max_rows), {}
    for number, one in enumerate(works):

        def listen(event, number=number):
            assert not isinstance(event, Failed), event.error
            if isinstance(event, Done):
                made[number] = event.picture

        engine.submit(one, listen)
        for _ in range(arrivals):
            engine.step()
    while any((engine.step(), engine.finish())):
        pass
    return [made[number] for number in range(len(works))]


@pytest.mark.parametrize("arrivals", [0, 1])
def test_every_row_equals_its_serial_result(together, arrivals):
    """Eight pictures with times, guidance, people, weights, masks, windows, true CFG and steps of their own."""
    painter, flux = together
    alone = [latents(painting(max_rows=1)[0], [one], 1)[0] for one in MIX]
    shared = latents(painter, MIX, 8, arrivals)
    assert 4 <= max(flux.rows) <= 8
    for ours, theirs in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_with_one_row_a_pass_not_a_bit_changes():
    """max_rows 1: pictures that are drawn at once are to the bit what they are alone."""
    painter, flux = painting(max_rows=1)
    alone = [latents(painter, [one], 1)[0] for one in MIX]
    at_once = latents(painter, MIX, 1, arrivals=1)
    assert set(flux.rows) == {1}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(at_once, alone, strict=True))


def test_passes_left_are_counted(together):
    """Steps of true CFG count twice, from its first step on."""
    painter, _ = together
    assert painter.passes(MIX[0], 1) == 3
    assert painter.passes(MIX[3], 0) == 6 + 5
    assert painter.passes(MIX[5], 0) == 4 + 1
    assert painter.passes(MIX[5], 4) == 0


def test_one_row_of_nan_fails_alone(together):
    """A row whose numbers are not finite is PictureInvalid; those that shared its passes are pictures."""
    bad = work(9)
    bad.text.tokens[:] = np.nan
    painter, flux = together
    engine, ended = Engine(painter, AlwaysTogether(), max_rows=8), {}
    for one in (MIX[0], bad, MIX[1]):
        engine.submit(one, lambda event, seed=one.seed: ended.update({seed: event}))
    while any((engine.step(), engine.finish())):
        pass
    assert max(flux.rows) == 3
    assert isinstance(ended[9].error, PictureInvalid)
    alone = draw(Engine(painter, Curves()), MIX[0])
    pixels = [np.asarray(Image.open(io.BytesIO(made.data))).astype(int) for made in (ended[1].picture, alone)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # a last bit may fall on either side of a cut
    assert isinstance(ended[2], Done)


def test_a_preview_shows_what_the_picture_will_be():
    """Previews come every few steps, a pixel a latent, and the last resembles the decoded picture."""
    settings = Settings()
    painter, _ = painting(vae=checkpoints.load_vae(checkpoints.files(settings), settings))
    engine, events = Engine(painter, Curves(), preview_steps=2), []
    engine.submit(work(1, [{}], num_steps=9), events.append)
    while any((engine.step(), engine.finish())):
        pass
    previews = [event.pixels for event in events if isinstance(event, Previewed)]
    assert [pixels.shape for pixels in previews] == [(16, 16, 3)] * 4
    picture = Image.open(io.BytesIO(events[-1].picture.data)).resize((16, 16), Image.Resampling.BOX)
    ours, theirs = previews[-1], np.asarray(picture)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.6
    assert abs(np.corrcoef(ours.swapaxes(0, 1).ravel(), theirs.ravel())[0, 1]) < 0.3  # no picture resembles every other


def test_the_previews_colours_are_the_decoders():
    """The map that is fitted gives latents of a real autoencoder, the miniature's, nearly the colours it gives them."""
    settings = Settings()
    vae = checkpoints.load_vae(checkpoints.files(settings), settings)
    colours = preview.fit(vae)
    coarse = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(5))
    latents = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = torch.nn.functional.adaptive_avg_pool2d(decoded, 16)[0].movedim(0, -1).clamp(-1, 1)
    ours = preview.project(latents, colours).float() / 127.5 - 1
    assert torch.corrcoef(torch.stack((ours.flatten(), expected.flatten())))[0, 1] > 0.8


def test_a_step_cache_never_crosses_rows():
    """With a step cache pictures drawn at once are to the bit what each is alone, and no pass is shared."""
    painter, flux = painting(max_rows=1, step_cache=0.5)
    works = [work(seed, [{"start_step": 3}], num_steps=8, true_cfg=2.0) for seed in (1, 2)]
    alone = [latents(painter, [one], 1)[0] for one in works]
    at_once = latents(painter, works, 8)
    assert set(flux.rows) == {1}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(at_once, alone, strict=True))
    whole = latents(painting()[0], works[:1], 1)[0]
    assert not torch.equal(alone[0], whole)  # steps really were skipped
    assert (alone[0] - whole).abs().max() < 0.5 * whole.abs().max()


def test_with_a_step_cache_pictures_go_one_after_another():
    """No pass can be shared, so that taking turns would only make both end late."""
    settings = Settings(
        acceleration=AccelerationSettings(step_cache=0.5), engine=EngineSettings(sizes=("256x256",), preview_steps=0)
    )
    flux = Watched(IdentityFlux(small.transformer(), small.cross_attentions()))
    engine, told = FluxDenoiser(flux, small.vae(), small.uncond(), {}, settings=settings).engine(), []
    for seed in (1, 2):
        engine.submit(work(seed), lambda event, seed=seed: isinstance(event, Stepped) and told.append(seed))
    while engine.step():
        pass
    assert told == [1] * 4 + [2] * 4
    assert set(flux.rows) == {1}
    with pytest.raises(ValueError, match="max_rows 1"):
        painting(max_rows=2, step_cache=0.5)


def test_a_pass_too_large_for_the_memory_is_tried_once():
    """Its rows are drawn in smaller passes, with nothing of it alive; the two rows of true CFG count as two."""
    curves, ended = AlwaysTogether(), []
    painter, flux = painting(curves=curves, most=2)
    engine = Engine(painter, curves, max_rows=8)
    for seed in (1, 2):
        engine.submit(work(seed, true_cfg=2.0), ended.append)
    while any((engine.step(), engine.finish())):
        pass
    assert sum(isinstance(event, Done) for event in ended) == 2
    assert [rows for rows in flux.rows if rows > 2] in ([3], [4])


def test_a_picture_whose_two_rows_do_not_fit_is_drawn_row_by_row():
    """Alone, true CFG has two rows, of which each goes by itself where the memory is too short for both."""
    curves = AlwaysTogether()
    painter, flux = painting(curves=curves, most=1)
    assert draw(Engine(painter, curves), work(1, true_cfg=2.0)).steps == 4
    assert flux.rows.count(2) == 1


def test_a_step_that_fails_changes_nothing():
    """Where the second of two passes fails neither picture has gone on, and no cache knows of the first."""
    painter, flux = painting(max_rows=1, step_cache=0.9, fails=6)
    drawings = [painter.begin(work(seed)) for seed in (1, 2)]
    painter.advance(drawings)
    painter.advance(drawings)
    assert drawings[0].caches[0].skipping
    before = [(drawing.step, drawing.latents) for drawing in drawings]
    with pytest.raises(RuntimeError):
        painter.advance(drawings)
    assert [(drawing.step, drawing.latents) for drawing in drawings] == before
    painter.advance(drawings)
    assert not drawings[0].caches[0].skipping
    assert [drawing.step for drawing in drawings] == [3, 3]


def test_a_newcomer_waits_at_most_one_step():
    """It begins with the next step, though its modulation comes from the host; of several one a step."""
    painter, flux = painting(modulation="host")
    engine, told = Engine(painter, AlwaysTogether(), max_rows=8), []

    def submit(seed, **fields):
        engine.submit(work(seed, **fields), lambda event: isinstance(event, Stepped) and told.append(seed))

    submit(1, num_steps=8)
    engine.step()
    for seed in (2, 3, 4):
        submit(seed, true_cfg=2.0)
    begun = [flux.conditionings]
    for expected in ([1, 2], [1, 2, 3], [1, 2, 3, 4]):
        told.clear()
        engine.step()
        begun.append(flux.conditionings)
        assert sorted(told) == expected
    assert begun == [1, 2, 3, 4]  # the table of both texts is made at once


def test_both_texts_modulate_as_each_would_alone():
    """Made together for true CFG, every row of the table is to the bit what it is by itself."""
    painter, flux = painting(modulation="table")
    one = work(1, true_cfg=2.0)
    both, alone = painter.begin(one).generation, painter.begin(work(1)).generation
    assert all(map(torch.equal, both.positive.pooled, alone.positive.pooled))
    swapped = painter.begin(replace(one, text=one.negative, negative=None)).generation
    assert all(map(torch.equal, both.negative.pooled, swapped.positive.pooled))


def test_a_picture_in_process_is_a_file():
    """FluxDenoiser.denoise draws with an engine of its own, until the picture's time is over."""
    one, denoiser = MIX[0], small.denoiser()
    picture = denoiser.denoise(one.request, 0, one.text, None, expires=time.time() + 100)
    assert Image.MIME["PNG"] == picture.media_type
    with pytest.raises(DeadlineExceeded):
        denoiser.denoise(one.request, 0, one.text, None, expires=time.time())

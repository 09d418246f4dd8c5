"""Rows of one pass: whatever shares it, each is what it would be alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import checkpoints
from pipeline.curves import Curves
from pipeline.denoise import FluxDenoiser, draw
from pipeline.drawing import Work
from pipeline.engine import Engine
from pipeline.errors import PictureInvalid
from pipeline.events import Done, Failed, Previewed
from pipeline.models import preview
from pipeline.request import Request
from pipeline.settings import AccelerationSettings, EngineSettings, Settings
from tests import small


class AlwaysTogether(Curves):
    """As if more rows cost nothing."""

    def seconds(self, shape, rows):
        return 1.0


@pytest.fixture(scope="module")
def denoiser() -> FluxDenoiser:
    made = small.denoiser()
    made.painter._curves = AlwaysTogether()
    return made


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
        self.painter, self.rows = painter, []

    def __getattr__(self, name):
        return getattr(self.painter, name)

    def advance(self, drawings):
        self.rows.append(len(drawings))
        self.painter.advance(drawings)

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
    return [made[number] for number in range(len(works))], painter.rows


@pytest.mark.parametrize("arrivals", [0, 1])
def test_every_row_equals_its_serial_result(denoiser, arrivals):
    """Eight pictures with times, guidance, people, weights, masks, windows, true CFG and steps of their own."""
    alone = [latents(denoiser.painter, [one], 1)[0][0] for one in MIX]
    together, rows = latents(denoiser.painter, MIX, 8, arrivals)
    assert max(rows) >= 4
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_with_one_row_a_pass_not_a_bit_changes():
    """max_rows 1: pictures that are drawn at once are to the bit what they are alone."""
    painter = small.denoiser(settings=Settings(engine=EngineSettings(max_rows=1))).painter
    painter._curves = AlwaysTogether()
    alone = [latents(painter, [one], 1)[0][0] for one in MIX]
    together, _ = latents(painter, MIX, 1, arrivals=1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))


def test_passes_left_are_counted(denoiser):
    """Steps of true CFG count twice, from its first step on."""
    assert denoiser.painter.passes(MIX[0], 1) == 3
    assert denoiser.painter.passes(MIX[3], 0) == 6 + 5
    assert denoiser.painter.passes(MIX[5], 0) == 4 + 1
    assert denoiser.painter.passes(MIX[5], 4) == 0


def test_one_row_of_nan_fails_alone(denoiser):
    """A row whose numbers are not finite is PictureInvalid; those that shared its passes are pictures."""
    bad = work(9)
    bad.text.tokens[:] = np.nan
    engine, ended = Engine(denoiser.painter, AlwaysTogether(), max_rows=8), {}
    for one in (MIX[0], bad, MIX[1]):
        engine.submit(one, lambda event, seed=one.seed: ended.update({seed: event}))
    while any((engine.step(), engine.finish())):
        pass
    assert isinstance(ended[9].error, PictureInvalid)
    alone = draw(Engine(denoiser.painter, Curves()), MIX[0])
    pixels = [np.asarray(Image.open(io.BytesIO(made.data))).astype(int) for made in (ended[1].picture, alone)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # a last bit may fall on either side of a cut
    assert isinstance(ended[2], Done)


def test_a_preview_shows_what_the_picture_will_be():
    """Previews come every few steps, a pixel a latent, and the last is close to the picture."""
    denoiser = small.denoiser()
    engine, events = Engine(denoiser.painter, Curves(), preview_steps=2), []
    engine.submit(work(1, [{}], num_steps=9), events.append)
    while any((engine.step(), engine.finish())):
        pass
    previews = [event.pixels for event in events if isinstance(event, Previewed)]
    assert [pixels.shape for pixels in previews] == [(32, 32, 3)] * 4
    assert previews[0].std() > 0


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
    settings = Settings(acceleration=AccelerationSettings(step_cache=0.5))
    denoiser = FluxDenoiser(small.denoiser().painter._flux, small.vae(), small.uncond(), {}, settings=settings)
    works = [work(seed, [{"start_step": 3}], num_steps=8, true_cfg=2.0) for seed in (1, 2)]
    alone = [latents(denoiser.painter, [one], 1)[0][0] for one in works]
    together, _ = latents(denoiser.painter, works, 8)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
    whole = latents(small.denoiser().painter, works[:1], 1)[0][0]
    assert not torch.equal(alone[0], whole)  # steps really were skipped
    assert (alone[0] - whole).abs().max() < 0.5 * whole.abs().max()


def test_a_picture_in_process_is_a_file(denoiser):
    """FluxDenoiser.denoise draws with an engine of its own."""
    one = MIX[0]
    picture = denoiser.denoise(one.request, 0, one.text, None)
    assert Image.MIME["PNG"] == picture.media_type

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.denoise import FluxDenoiser
from pipeline.drawing import Work
from pipeline.errors import Cancelled, MaskUnreadable, PictureInvalid
from pipeline.models.flux import IdentityFlux, IdentityRows
from pipeline.painter import pixels_per_token
from pipeline.request import Request
from pipeline.settings import Settings
from tests import small


@pytest.fixture(scope="module")
def denoiser() -> FluxDenoiser:
    return small.denoiser()


def request(people=(), **fields) -> Request:
    people = [{"photos": ["AAAA"], **person} for person in people]
    fields = {"prompt": "portrait", "width": 256, "height": 256, "num_steps": 3, "seed": 5} | fields
    return Request.model_validate({"people": people, **fields})


def draw(denoiser, req, *identities, **options) -> bytes:
    negative = small.text(2) if req.uses_true_cfg else None
    return denoiser.denoise(req, 0, small.text(1), negative, *identities, **options).data


def test_a_picture_says_how_it_came_about(denoiser):
    """Size, seed, steps, faces, seconds of every stage and the files used are all told."""
    picture = denoiser.denoise(request([{}], num_outputs=2), 1, small.text(1), None, small.identity(1))
    assert Image.open(io.BytesIO(picture.data)).size == (256, 256)
    assert (picture.width, picture.height, picture.seed, picture.steps) == (256, 256, 6, 3)
    assert picture.faces[0][0].score == 0.9
    assert set(picture.trace.seconds) == {"faces", "identity", "text", "queue", "denoise"}
    assert picture.trace.models == {"flux": "00", "t5": "11", "pulid": "22"}


def test_id_weight_zero_is_a_request_without_people(denoiser):
    """The bytes are the same, with true CFG and a mask too."""
    zero = [{"id_weight": 0.0, "mask": {"box": [0, 0, 0.5, 1]}}]
    for fields in ({}, {"true_cfg": 3.0}):
        assert draw(denoiser, request(zero, **fields), small.identity(1)) == draw(denoiser, request(**fields))
    assert draw(denoiser, request([{}]), small.identity(1)) != draw(denoiser, request())


def test_an_identity_leaks_into_nobody_elses_picture(denoiser):
    """After another person's request a request gives the bytes it gave before."""
    first, plain = draw(denoiser, request([{}]), small.identity(1)), draw(denoiser, request())
    assert draw(denoiser, request([{}]), small.identity(2)) != first
    assert draw(denoiser, request([{}]), small.identity(1)) == first
    assert draw(denoiser, request()) == plain


def test_the_window_of_steps(denoiser):
    """start_step and end_step bound when the identity acts; a window over all steps is no window."""
    whole, plain = draw(denoiser, request([{}]), small.identity(1)), draw(denoiser, request())
    late = draw(denoiser, request([{"start_step": 1}]), small.identity(1))
    early = draw(denoiser, request([{"end_step": 1}]), small.identity(1))
    assert len({whole, plain, late, early}) == 4
    assert draw(denoiser, request([{"start_step": 0, "end_step": 3}]), small.identity(1)) == whole


def test_true_cfg_reads_the_negative_prompt_and_nobody(denoiser):
    """The second pass changes the picture from its first step on; a start after the last step turns it off."""
    one = request([{}], true_cfg=3.0)
    with_cfg = draw(denoiser, one, small.identity(1))
    other = denoiser.denoise(one, 0, small.text(1), small.text(9), small.identity(1)).data
    assert with_cfg != other  # the negative prompt counts
    assert with_cfg != draw(denoiser, request([{}]), small.identity(1))
    never = request([{}], true_cfg=3.0, timestep_to_start_cfg=3)
    assert draw(denoiser, never, small.identity(1)) == draw(denoiser, request([{}]), small.identity(1))


def test_two_people_each_in_a_half(denoiser):
    """Two people with masks make another picture than either alone, and their order does not matter much."""
    left, right = {"mask": {"box": [0, 0, 0.5, 1]}}, {"mask": {"box": [0.5, 0, 1, 1]}}
    both = draw(denoiser, request([left, right]), small.identity(1), small.identity(2))
    assert both != draw(denoiser, request([left]), small.identity(1))
    swapped = draw(denoiser, request([right, left]), small.identity(2), small.identity(1))
    pixels = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (both, swapped)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_several_photos_side_by_side(denoiser):
    """The tokens of fusion concat, 32 per photo, are accepted."""
    assert draw(denoiser, request([{}]), small.identity(1, photos=3))


def test_progress_and_cancelling(denoiser):
    """Every step is told; a cancelled request stops before its next step."""
    seen = []
    draw(denoiser, request(), on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    with pytest.raises(Cancelled):
        draw(denoiser, request(), on_step=lambda done, _: seen.append(done), cancelled=lambda: len(seen) == 2)
    assert seen == [1, 2]


def test_an_image_token_is_as_large_as_the_autoencoder_says():
    """Four levels, as FLUX.1's, make a token of 16 x 16 pixels; the miniature's five one of 32 x 32."""
    assert [pixels_per_token(small.vae(levels)) for levels in (4, 5)] == [16, 32]


def test_a_size_between_two_tokens_is_the_middle_of_the_next_larger_picture():
    """Every size that a request may have comes out; what is beyond it is cut off evenly on both sides."""
    coarse = small.denoiser(levels=5)
    whole, middle = (
        np.asarray(Image.open(io.BytesIO(draw(coarse, request([{}], **size), small.identity(1)))))
        for size in ({"width": 320, "height": 288}, {"width": 304, "height": 272})
    )
    assert whole.shape == (288, 320, 3)
    np.testing.assert_array_equal(middle, whole[8:-8, 8:-8])


@pytest.mark.parametrize("right", [0.25, 1])
def test_a_mask_is_a_part_of_the_picture_that_comes_out(right):
    """At a size between two tokens too: a quarter of the mask covers a quarter of the pixels that are not cut off."""
    person = request([{"mask": {"box": [0, 0, right, 1]}}], width=304, height=272)
    drawing = small.denoiser(levels=5).painter.begin(Work(person, 0, small.text(1), None, (small.identity(1),)))
    mask = drawing.generation.people[0].mask
    pixels = np.kron(mask.reshape(9, 10), np.ones((32, 32)))[8:-8, 8:-8]  # as large as the picture
    assert pixels.mean() == pytest.approx(right)
    assert (pixels[:, :56] == 1).all()  # the tokens that lie in the quarter
    assert right == 1 or (pixels[:, 88:] == 0).all()


def test_numbers_that_are_no_picture_are_an_error():
    """NaN in a weight ends in picture_invalid, not in a black file."""
    broken = small.denoiser()
    with torch.no_grad():
        broken.painter._flux.transformer.proj_out.weight[0, 0] = torch.nan
    with pytest.raises(PictureInvalid, match="not finite"):
        draw(broken, request())


def test_a_black_picture_is_an_error():
    """A decoder that gives only black ends in picture_invalid."""
    broken = small.denoiser()
    with torch.no_grad():
        broken.painter._vae.decoder.conv_out.weight.zero_()
        broken.painter._vae.decoder.conv_out.bias.fill_(-2)
    with pytest.raises(PictureInvalid, match="black"):
        draw(broken, request())


def test_a_bad_mask_is_the_callers_error(denoiser):
    """A mask that is no picture is refused before the first step."""
    seen = []
    with pytest.raises(MaskUnreadable):
        draw(denoiser, request([{"mask": {"base64": "bm8="}}]), small.identity(1), on_step=lambda *a: seen.append(a))
    assert seen == []


@pytest.mark.parametrize(("name", "magic"), [("png", b"\x89PNG"), ("jpg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_formats(denoiser, name, magic):
    """Each output format is what it says."""
    assert draw(denoiser, request(output_format=name)).startswith(magic)


def test_a_model_without_guidance_embedding():
    """flux-schnell takes no guidance: the scale changes nothing."""
    schnell = small.denoiser(guidance_embeds=False)
    assert draw(schnell, request(guidance_scale=2.0)) == draw(schnell, request(guidance_scale=8.0))


def reference(req, text, negative, identities, masks) -> np.ndarray:
    """The official algorithm written out once more (pulid.md 2.9 to 2.11), on the same small networks."""
    model, autoencoder = IdentityFlux(small.transformer(), small.cross_attentions()), small.vae()
    rows, columns = req.height // 16, req.width // 16
    mu = 0.5 + (rows * columns - 256) * (1.15 - 0.5) / (4096 - 256)
    times = [
        1.0 if i == 0 else math.exp(mu) / (math.exp(mu) + n / (n - i) - 1) if i < n else 0.0
        for n in [req.num_steps]
        for i in range(n + 1)
    ]
    positions = torch.tensor([[0.0, row, column] for row in range(rows) for column in range(columns)])
    noise = torch.randn(1, 16, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(req.seed))
    image = einops_pack(noise, rows, columns)

    def predict(at, words, tokens):
        people = []
        for person, mask, own in zip(req.people, masks, tokens, strict=True):
            weight = person.id_weight if person.start_step <= at < (person.end_step or req.num_steps) else 0.0
            people.append(IdentityRows(own, torch.full((1, 1, 1), weight), torch.tensor(mask).reshape(1, -1, 1)))
        inputs = (torch.tensor(words.tokens)[None], torch.tensor(words.pooled)[None], positions, people)
        return model.predict(image, torch.tensor([times[at]]), torch.tensor([req.guidance_scale]), *inputs)

    for at in range(req.num_steps):
        velocity = predict(at, text, [torch.tensor(identity.tokens)[None] for identity in identities])
        if at >= req.timestep_to_start_cfg:
            nobody = predict(at, negative, [small.uncond()] * len(identities))
            velocity = nobody + req.true_cfg * (velocity - nobody)
        image = image + (times[at + 1] - times[at]) * velocity
    patches = image.reshape(rows, columns, 16, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 16, 2 * rows, 2 * columns)
    decoded = autoencoder.decode(patches / 0.3611 + 0.1159, return_dict=False)[0][0].clamp(-1, 1)
    return np.floor(127.5 * (decoded.permute(1, 2, 0).numpy() + 1)).astype(np.uint8)


def einops_pack(latents, rows, columns):
    """b c (h 2) (w 2) -> b (h w) (c 2 2)."""
    return latents.reshape(16, rows, 2, columns, 2).permute(1, 3, 0, 2, 4).reshape(1, rows * columns, 64)


@torch.no_grad()
def test_a_whole_request_is_the_official_algorithm(denoiser):
    """Oblong, two people with weights, windows and masks of their own, true CFG: the pixels are the reference's."""
    people = [
        {"id_weight": 0.7, "mask": {"box": [0, 0, 0.5, 1]}},
        {"id_weight": 1.3, "start_step": 1, "end_step": 3, "mask": {"box": [0.25, 0.5, 1, 1]}},
    ]
    fields = {"width": 384, "num_steps": 4, "guidance_scale": 3.0, "true_cfg": 2.5, "timestep_to_start_cfg": 2}
    req = request(people, **fields)
    left, lower = np.zeros((16, 24), np.float32), np.zeros((16, 24), np.float32)
    left[:, :12] = lower[8:, 6:] = 1
    identities = [small.identity(1), small.identity(2)]
    made = denoiser.denoise(req, 0, small.text(1), small.text(2), *identities).data
    ours = np.asarray(Image.open(io.BytesIO(made))).astype(int)
    theirs = reference(req, small.text(1), small.text(2), identities, [left, lower]).astype(int)
    # a last bit of float32 may fall on either side of a cut
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 1e-3
    assert ours.std() > 10


def test_flux_schnell_is_not_shifted():
    """Without shift the times are even, and the picture another."""
    plain = FluxDenoiser(small.denoiser().painter._flux, small.vae(), small.uncond(), {}, shift=False)
    assert draw(plain, request(num_steps=4)) != draw(small.denoiser(), request(num_steps=4))


@pytest.mark.parametrize(("values", "kept"), [({}, 1), ({"cache": {"identity_bytes": 0}}, 0)])
def test_where_no_face_is_remembered_no_identity_stays_folded(values, kept):
    """`cache.identity_bytes` 0 is for the folded identities of the denoiser too."""
    forgetful = small.denoiser(settings=Settings(**values))
    draw(forgetful, request([{}]), small.identity(1))
    assert forgetful._folded.stats().entries == kept


class Full(IdentityFlux):
    """A FLUX on a card that is too full for the first identity after nobody's."""

    prepared = 0

    def prepare(self, tokens):
        self.prepared += 1
        if self.prepared == 2:
            raise torch.OutOfMemoryError
        return super().prepare(tokens)


def test_a_fold_that_fails_leaves_nothing_behind(denoiser):
    """A card too full to fold a person fails that picture alone: the same one draws when there is room."""
    flux = Full(small.transformer(), small.cross_attentions())
    full = FluxDenoiser(flux, small.vae(), small.uncond(), {})
    with pytest.raises(torch.OutOfMemoryError):
        draw(full, request([{}]), small.identity(1))
    stats = full._folded.stats()
    assert (stats.entries, stats.bytes) == (0, 0)
    assert draw(full, request([{}]), small.identity(1)) == draw(denoiser, request([{}]), small.identity(1))

"""FluxPainter: how FLUX draws the pictures of an Engine. Nothing of a picture is kept on it."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.caches import Cache, digest
from pipeline.curves import Curves, Shape
from pipeline.drawing import Conditioning, Drawing, Generation, Presence, Row, Work
from pipeline.errors import PictureInvalid
from pipeline.identity import Identity
from pipeline.models import preview
from pipeline.models.flux import IdentityFlux
from pipeline.models.folding import PreparedIdentity
from pipeline.models.sampling import euler_step, image_ids, noise, pack, schedule, unpack
from pipeline.models.step_cache import StepCache
from pipeline.passes import Passes
from pipeline.photos import mask_grid
from pipeline.picture import MEDIA_TYPES, Picture, encode
from pipeline.request import Request
from pipeline.text import Text
from pipeline.trace import Trace, total

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class FluxPainter:
    """Draws with FLUX, PuLID and the autoencoder; see pipeline.engine.Painter."""

    def __init__(  # noqa: PLR0913 - the networks, what they share, and how pictures are drawn
        self,
        flux: IdentityFlux,
        vae: "AutoencoderKL",
        uncond: Tensor,
        models: Mapping[str, str],
        folded: Cache[PreparedIdentity],
        curves: Curves,
        *,
        shift: bool = True,
        max_rows: int = 1,
        step_cache: float = 0.0,
    ) -> None:
        """`uncond`: the identity tokens of nobody (1, 32, 2048), a constant of the checkpoint, folded here and now.

        `shift`: flux-dev's schedule. `step_cache`: the threshold of the first-block cache; 0: none.
        """
        self._flux, self._vae, self._models = flux, vae, dict(models)
        self._folded = folded
        self._device, self._dtype = uncond.device, uncond.dtype
        self._shift, self._step_cache = shift, step_cache
        if step_cache and max_rows > 1:
            raise ValueError("each row of a cached step decides for itself whether to skip: it takes max_rows 1")
        self._passes = Passes(flux, curves, max_rows, uncond)
        self._edge = pixels_per_token(vae)
        self._colours = preview.fit(vae)
        with torch.inference_mode():
            self._uncond = flux.prepare(uncond)
        # pictures are decoded beside the steps of others
        cuda = self._device.type == "cuda"
        self._beside = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]

    def shape(self, work: Work) -> Shape:
        """See pipeline.engine.Painter."""
        return self.shape_of(work.request.width, work.request.height, work.text.tokens.shape[0])

    def shape_of(self, width: int, height: int, text: int) -> Shape:
        """The shape of pictures of a size in pixels with so many text tokens."""
        return Shape(math.ceil(height / self._edge), math.ceil(width / self._edge), text)

    def steps(self, work: Work) -> int:
        """See pipeline.engine.Painter."""
        return work.request.num_steps

    def passes(self, work: Work, done: int) -> int:
        """See pipeline.engine.Painter."""
        steps, guided = work.request.num_steps, work.request.timestep_to_start_cfg
        return steps - done + (0 if work.negative is None else max(0, steps - max(done, guided)))

    @torch.inference_mode()
    def begin(self, work: Work) -> Drawing:
        """Noise, schedule, folded identities, modulation. Raises MaskUnreadable."""
        began, request = time.perf_counter(), work.request
        shape = self.shape(work)
        rows, columns = shape.rows, shape.columns
        times = schedule(request.num_steps, rows * columns, self._shift).to(self._device)
        ids = image_ids(rows, columns).to(self._device)
        guides = bool(self._flux.transformer.config.guidance_embeds)
        guidance = torch.tensor([request.guidance_scale], device=self._device) if guides else None
        positive, *negative = self._conditionings(work, times[:-1], guidance)
        generation = Generation(
            shape=shape,
            times=times.chunk(len(times)),
            deltas=times.diff().chunk(request.num_steps),
            guidance=guidance,
            ids=ids,
            text_ids=ids.new_zeros(shape.text, 3),
            positive=positive,
            negative=negative[0] if negative else None,
            true_cfg=request.true_cfg,
            cfg_step=request.timestep_to_start_cfg,
            people=tuple(
                self._presence(request, index, identity, shape)
                for index, (person, identity) in enumerate(zip(request.people, work.identities, strict=True))
                if person.id_weight > 0  # a weight of 0 is nobody, to the bit
            ),
        )
        latents = noise(work.seed, 2 * rows, 2 * columns, self._vae.config.latent_channels)
        caches = (StepCache(self._step_cache), StepCache(self._step_cache)) if self._step_cache else None
        return Drawing(work, generation, pack(latents).to(self._device), caches, began)

    @torch.inference_mode()
    def advance(self, drawings: Sequence[Drawing]) -> None:
        """One step of each; see pipeline.engine.Painter. All have one shape."""
        try:
            stepped = self._stepped(drawings)
            self._passes.wait()
        except Exception:
            for cache in (cache for drawing in drawings for cache in drawing.caches or ()):
                cache.forget()  # it may know of a step that never was
            raise
        for drawing, (latents, velocity) in zip(drawings, stepped, strict=True):
            drawing.latents, drawing.velocity = latents, velocity
            drawing.step += 1

    def _stepped(self, drawings: Sequence[Drawing]) -> list[tuple[Tensor, Tensor]]:
        """Latents and velocity of each after its next step."""
        rows = [self._row(drawing, positive=True) for drawing in drawings]
        guided = [drawing for drawing in drawings if drawing.generation.guided(drawing.step)]
        velocities = self._passes.predict([*rows, *(self._row(drawing, positive=False) for drawing in guided)])
        opposite = dict(zip(map(id, guided), velocities[len(rows) :], strict=True)) if guided else {}
        stepped = []
        for drawing, velocity in zip(drawings, velocities, strict=False):
            if id(drawing) in opposite:
                negative = opposite[id(drawing)]
                velocity = negative + drawing.generation.true_cfg * (velocity - negative)
            stepped.append((euler_step(drawing.latents, velocity, drawing.generation.deltas[drawing.step]), velocity))
        return stepped

    @torch.inference_mode()
    def preview(self, drawing: Drawing) -> NDArray[np.uint8]:
        """The picture that the last velocity leads to, a pixel for each latent: (H / 8, W / 8, 3)."""
        latents, shape = drawing.latents, drawing.generation.shape
        if drawing.velocity is not None:  # straight on to time 0
            latents = latents - drawing.generation.times[drawing.step] * drawing.velocity.float()
        grid = unpack(latents, shape.rows, shape.columns)  # (1, 16, H/8, W/8)
        pixels: NDArray[np.uint8] = preview.project(grid, self._colours).cpu().numpy()
        return pixels

    @torch.inference_mode()
    def finish(self, drawing: Drawing) -> Picture:
        """Decode and encode. Raises PictureInvalid where the numbers are no picture."""
        work, request = drawing.work, drawing.work.request
        with nullcontext() if self._beside is None else torch.cuda.stream(self._beside):
            pixels = self._decode(drawing)
        data = encode(pixels, request.output_format, request.output_quality)
        now = time.perf_counter()
        seconds = Trace({"queue": drawing.began - work.accepted, "denoise": now - drawing.began}, self._models)
        inputs = [identity.trace for identity in work.identities]
        inputs += [text.trace for text in (work.text, work.negative) if text is not None]
        return Picture(
            data=data,
            media_type=MEDIA_TYPES[request.output_format],
            width=request.width,
            height=request.height,
            seed=work.seed,
            steps=request.num_steps,
            prompt_truncated=work.text.truncated,
            faces=tuple(identity.boxes for identity in work.identities),
            trace=total([*inputs, seconds]),
        )

    def relieve(self, error: Exception) -> bool:
        """See pipeline.engine.Painter."""
        scarce = isinstance(error, torch.OutOfMemoryError)
        if scarce:
            self._give_back()
        return scarce

    def seconds(self, shape: Shape, rows: int) -> float:
        """How long a step of `rows` rows takes, measured on zeros, without people; infinity where memory is short."""
        taken = self._passes.seconds(shape, rows)
        if math.isinf(taken):
            self._give_back()
        return taken

    def _conditionings(self, work: Work, times: Tensor, guidance: Tensor | None) -> list[Conditioning]:
        """That of the prompt, and of the negative one if there is one; times (S,)."""
        texts: list[Text] = [text for text in (work.text, work.negative) if text is not None]
        pooled = torch.stack([self._tensor(text.pooled) for text in texts]).repeat_interleave(len(times), 0)
        # at once, as weights that lie in host memory come to the device for it: (texts * S, 768 or the table's width)
        rows = self._flux.conditioning(times.repeat(len(texts)), guidance, pooled).chunk(len(pooled))
        return [
            Conditioning(self._tensor(text.tokens)[None], rows[at : at + len(times)])
            for text, at in zip(texts, range(0, len(rows), len(times)), strict=True)
        ]

    def _presence(self, request: Request, index: int, identity: Identity, shape: Shape) -> Presence:
        person = request.people[index]
        mask = None
        if person.mask is not None:
            rows, columns = shape.rows, shape.columns
            # a mask speaks of the picture, which _decode cuts out of the middle of the grid
            beyond = (rows - request.height / self._edge) / 2, (columns - request.width / self._edge) / 2
            grid = mask_grid(person.mask, rows, columns, f"people[{index}].mask", beyond)
            mask = torch.from_numpy(grid).reshape(1, -1, 1).to(self._device)  # (1, N, 1)
        return Presence(
            start_step=person.start_step,
            end_step=request.num_steps if person.end_step is None else person.end_step,
            positive=self._prepared(identity),
            negative=self._uncond,
            # float32 in every dtype of the model: bfloat16 would make 0.85 of it 0.8516
            weight=torch.full((1, 1, 1), person.id_weight, device=self._device),
            mask=mask,
        )

    def _prepared(self, identity: Identity) -> PreparedIdentity:
        def prepare() -> PreparedIdentity:
            return self._flux.prepare(self._tensor(identity.tokens)[None])

        return self._folded.get_or_compute(("", digest(identity.tokens)), prepare)

    def _tensor(self, array: NDArray[np.float32]) -> Tensor:
        # A copy: what comes from another replica is read-only memory shared with others.
        return torch.tensor(array, device=self._device, dtype=self._dtype)

    def _row(self, drawing: Drawing, positive: bool) -> Row:
        generation, step = drawing.generation, drawing.step
        acting = [person for person in generation.people if person.acts(step)]
        cache = None if drawing.caches is None else drawing.caches[0 if positive else 1]
        if cache is not None and any(person.acts(step) != person.acts(step - 1) for person in generation.people):
            cache.forget()  # the residuals jump where an identity begins or ends to act
        conditioning = generation.positive if positive else generation.negative
        assert conditioning is not None
        people = tuple((person, person.positive if positive else person.negative) for person in acting)
        return Row(drawing, conditioning, people, cache)

    def _give_back(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _decode(self, drawing: Drawing) -> NDArray[np.uint8]:
        request, shape, latents = drawing.work.request, drawing.generation.shape, drawing.latents
        if not torch.isfinite(latents).all():
            raise PictureInvalid("The picture came out as numbers that are not finite; try another seed or dtype.")
        config = self._vae.config
        scaled = unpack(latents, shape.rows, shape.columns) / config.scaling_factor + config.shift_factor
        image = self._vae.decode(scaled.to(self._vae.dtype), return_dict=False)[0]  # (1, 3, H, W)
        if not torch.isfinite(image).all():
            raise PictureInvalid("The decoded picture holds numbers that are not finite; try another dtype.")
        # Cut off, not rounded: as the official code turns floats into bytes.
        pixels: NDArray[np.uint8] = (127.5 * (image[0].float().clamp(-1, 1) + 1)).byte().permute(1, 2, 0).cpu().numpy()
        if not pixels.any():
            raise PictureInvalid("The picture came out black all over; try another seed or dtype.")
        # Where the grid is larger than the picture, the middle of it: there the model has put its subject.
        top, left = (pixels.shape[0] - request.height) // 2, (pixels.shape[1] - request.width) // 2
        return pixels[top : top + request.height, left : left + request.width]


def pixels_per_token(vae: "AutoencoderKL") -> int:
    """The edge of an image token, which is 2 x 2 latents: 16 pixels with FLUX.1's autoencoder."""
    return int(2 ** len(vae.config.block_out_channels))  # 2 * 2 ** (levels - 1)

"""FluxDenoiser: Request, Text, Identities -> Picture (FLUX loop, VAE)."""

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import Cancelled, PictureInvalid, WeightsCorrupt
from pipeline.faces import FaceBox
from pipeline.identity import Identity
from pipeline.photos import mask_grid
from pipeline.request import MAX_SEED, Request
from pipeline.settings import Settings
from pipeline.text import Text
from pipeline.trace import Trace, total

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from pipeline.models.flux import IdentityFlux, IdentityRows

MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A finished picture: its encoded bytes and how they came about.

    faces: per person of the request, the faces that the identity came from. prompt_truncated: the prompt had more
    tokens than max_sequence_length, and its end was not read.
    """

    data: bytes
    media_type: str
    width: int
    height: int
    seed: int
    steps: int
    prompt_truncated: bool
    faces: tuple[tuple[FaceBox, ...], ...]
    trace: Trace


@dataclass(frozen=True, slots=True, eq=False)
class Presence:
    """A person in a generation: from which step to which, and with which rows in the positive and negative pass."""

    start_step: int
    end_step: int
    positive: "IdentityRows"
    negative: "IdentityRows"


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """All that the loop reads: one picture of a request, as tensors on the model's device.

    times (num_steps + 1,) float32; guidance (1,) or None; ids (N, 3); positive and negative: text (1, L, 4096) and
    pooled (1, 768); the second pass runs from step `cfg_step` on, and never without `negative`.
    """

    times: "Tensor"
    guidance: "Tensor | None"
    ids: "Tensor"
    positive: tuple["Tensor", "Tensor"]
    negative: "tuple[Tensor, Tensor] | None"
    true_cfg: float
    cfg_step: int
    people: tuple[Presence, ...]


class FluxDenoiser:
    """Draws one picture at a time; what belongs to a request is never kept on it."""

    def __init__(
        self,
        flux: "IdentityFlux",
        vae: "AutoencoderKL",
        uncond: "Tensor",
        models: Mapping[str, str],
        shift: bool = True,
    ) -> None:
        """`uncond`: the identity tokens of nobody (1, 32, 2048), a constant of the checkpoint."""
        self._flux = flux
        self._vae = vae
        self._edge = pixels_per_token(vae)
        self._uncond = uncond
        self._models = dict(models)
        self._shift = shift

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """Read the networks from the preset's files; raises WeightsError."""
        import torch

        from pipeline import checkpoints
        from pipeline.models.flux import IdentityFlux
        from pipeline.weights import PRESETS

        files, sizes = checkpoints.files(settings), checkpoints.sizes(settings)
        with torch.inference_mode():
            uncond = checkpoints.load_idformer(files, settings).unconditional(sizes.face_tokens)
        preset, transformer = PRESETS[settings.preset], checkpoints.load_flux(files, settings)
        if bool(transformer.config.guidance_embeds) != preset.guidance:
            raise WeightsCorrupt(
                f"{files.path('flux')} is not the FLUX of the preset {preset.name}: only dev models have a guidance "
                "embedding, schnell has none; set PULID_PRESET to the preset that fits the file."
            )
        attentions = checkpoints.load_cross_attentions(files, settings)
        try:
            flux = IdentityFlux(transformer, attentions, sizes.double_interval, sizes.single_interval)
        except ValueError as error:
            raise WeightsCorrupt(f"{files.path('flux')} is no FLUX.1 that PuLID fits: {error}.") from error
        vae = checkpoints.load_vae(files, settings)
        return cls(flux, vae, uncond, files.hashes("flux", "vae", "pulid"), preset.shift)

    def denoise(
        self,
        request: Request,
        number: int,
        text: Text,
        negative: Text | None,
        *identities: Identity,
        on_step: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Picture:
        """Picture `number` of a request that has a seed; `identities` are those of its people, in order.

        `on_step(done, total)` is called after every step. `cancelled` is asked before every step, and makes it raise
        Cancelled. Raises MaskUnreadable, and PictureInvalid where the numbers are no picture.
        """
        import torch

        started = time.perf_counter()
        seed = ((request.seed or 0) + number) & MAX_SEED
        with torch.inference_mode():
            generation = self._prepare(request, text, negative, identities)
            latents = self._start(request, seed)
            for step in range(request.num_steps):
                if cancelled is not None and cancelled():
                    raise Cancelled("The request was cancelled; its picture was not finished.")
                latents = self._step(generation, step, latents)
                if on_step is not None:
                    on_step(step + 1, request.num_steps)
            pixels = self._decode(latents, request)
        data = encode(pixels, request.output_format, request.output_quality)
        seconds = Trace({"denoise": time.perf_counter() - started}, self._models)
        inputs = [identity.trace for identity in identities] + [t.trace for t in (text, negative) if t is not None]
        return Picture(
            data=data,
            media_type=MEDIA_TYPES[request.output_format],
            width=request.width,
            height=request.height,
            seed=seed,
            steps=request.num_steps,
            prompt_truncated=text.truncated,
            faces=tuple(identity.boxes for identity in identities),
            trace=total([*inputs, seconds]),
        )

    def _prepare(
        self, request: Request, text: Text, negative: Text | None, identities: tuple[Identity, ...]
    ) -> Generation:
        import torch

        from pipeline.models.sampling import image_ids, schedule

        rows, columns = self._grid(request)
        guides = bool(self._flux.transformer.config.guidance_embeds)
        return Generation(
            times=schedule(request.num_steps, rows * columns, self._shift).to(self._uncond.device),
            guidance=torch.tensor([request.guidance_scale], device=self._uncond.device) if guides else None,
            ids=image_ids(rows, columns).to(self._uncond.device),
            positive=self._conditioning(text),
            negative=None if negative is None else self._conditioning(negative),
            true_cfg=request.true_cfg,
            cfg_step=request.timestep_to_start_cfg,
            people=tuple(
                self._presence(request, index, identity)
                for index, (person, identity) in enumerate(zip(request.people, identities, strict=True))
                if person.id_weight > 0  # a weight of 0 is nobody, to the bit
            ),
        )

    def _conditioning(self, text: Text) -> tuple["Tensor", "Tensor"]:
        return self._tensor(text.tokens)[None], self._tensor(text.pooled)[None]

    def _presence(self, request: Request, index: int, identity: Identity) -> Presence:
        import torch

        from pipeline.models.flux import IdentityRows

        person, device = request.people[index], self._uncond.device
        # float32 in every dtype of the model: bfloat16 would make 0.85 of it 0.8516
        weight = torch.full((1, 1, 1), person.id_weight, device=device)
        mask = None
        if person.mask is not None:
            rows, columns = self._grid(request)
            # a mask speaks of the picture, which _decode cuts out of the middle of the grid
            beyond = (rows - request.height / self._edge) / 2, (columns - request.width / self._edge) / 2
            grid = mask_grid(person.mask, rows, columns, f"people[{index}].mask", beyond)
            mask = torch.from_numpy(grid).reshape(1, -1, 1).to(device)  # (1, N, 1)
        end = request.num_steps if person.end_step is None else person.end_step
        return Presence(
            start_step=person.start_step,
            end_step=end,
            positive=IdentityRows(self._tensor(identity.tokens)[None], weight, mask),
            negative=IdentityRows(self._uncond, weight, mask),
        )

    def _tensor(self, array: NDArray[np.float32]) -> "Tensor":
        import torch

        # A copy: what comes from another replica is read-only memory shared with others.
        return torch.tensor(array, device=self._uncond.device, dtype=self._uncond.dtype)

    def _start(self, request: Request, seed: int) -> "Tensor":
        from pipeline.models.sampling import noise, pack

        rows, columns = self._grid(request)
        latents = noise(seed, 2 * rows, 2 * columns, self._vae.config.latent_channels)
        return pack(latents).to(self._uncond.device)  # (1, N, 64) float32

    def _step(self, generation: Generation, step: int, latents: "Tensor") -> "Tensor":
        from pipeline.models.sampling import euler_step

        active = [person for person in generation.people if person.start_step <= step < person.end_step]
        now, then = generation.times[step], generation.times[step + 1]

        def predict(conditioning: tuple["Tensor", "Tensor"], people: list[Any]) -> "Tensor":
            rows = latents.to(self._uncond.dtype)
            return self._flux.predict(rows, now[None], generation.guidance, *conditioning, generation.ids, people)

        velocity = predict(generation.positive, [person.positive for person in active])
        if generation.negative is not None and step >= generation.cfg_step:
            opposite = predict(generation.negative, [person.negative for person in active])
            velocity = opposite + generation.true_cfg * (velocity - opposite)
        return euler_step(latents, velocity, now, then)

    def _decode(self, latents: "Tensor", request: Request) -> NDArray[np.uint8]:
        import torch

        from pipeline.models.sampling import unpack

        if not torch.isfinite(latents).all():
            raise PictureInvalid("The picture came out as numbers that are not finite; try another seed or dtype.")
        config, (rows, columns) = self._vae.config, self._grid(request)
        scaled = unpack(latents, rows, columns) / config.scaling_factor + config.shift_factor  # (1, 16, H/8, W/8)
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

    def _grid(self, request: Request) -> tuple[int, int]:
        """The rows and columns of image tokens that cover the picture."""
        return math.ceil(request.height / self._edge), math.ceil(request.width / self._edge)


def pixels_per_token(vae: "AutoencoderKL") -> int:
    """The edge of an image token, which is 2 x 2 latents: 16 pixels with FLUX.1's autoencoder."""
    return int(2 ** len(vae.config.block_out_channels))  # 2 * 2 ** (levels - 1)


def encode(pixels: NDArray[np.uint8], output_format: str, quality: int) -> bytes:
    """Pixels (H, W, 3) as the bytes of a png, jpg or webp file; `quality` counts for the last two."""
    from PIL import Image

    buffer = io.BytesIO()
    options: dict[str, Any] = {} if output_format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(buffer, format="JPEG" if output_format == "jpg" else output_format, **options)
    return buffer.getvalue()

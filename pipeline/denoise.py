"""FluxDenoiser: Request, Text, Identities -> Picture (FLUX loop, VAE)."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from pipeline.caches import Cache, folded_cache
from pipeline.curves import Curves
from pipeline.drawing import Work
from pipeline.engine import Engine
from pipeline.errors import WeightsCorrupt
from pipeline.events import Done, Event, Failed, Stepped
from pipeline.identity import Identity
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.text import Text

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

    from pipeline.models.flux import IdentityFlux

TEXT_TOKENS = 128  # what a prompt has unless more are asked for
MINIATURE_SIZES = ("256x256", "512x512")
SIZES = ("512x512", "896x1152", "1024x1024")


class FluxDenoiser:
    """Draws pictures, one at a time or many in an engine; what belongs to a request is never kept on it."""

    def __init__(
        self,
        flux: "IdentityFlux",
        vae: "AutoencoderKL",
        uncond: "Tensor",
        models: Mapping[str, str],
        shift: bool = True,
        settings: Settings | None = None,
    ) -> None:
        """`uncond`: the identity tokens of nobody (1, 32, 2048), a constant of the checkpoint."""
        from pipeline.acceleration import compile_mode
        from pipeline.models.folding import PreparedIdentity
        from pipeline.painter import FluxPainter

        settings = Settings() if settings is None else settings
        self._flux, self._uncond = flux, uncond
        self._settings, self._max_rows = settings.engine, settings.max_rows
        # where memory is short, one picture may wait for a shorter one in the middle of its steps, but not many
        self._max_begun = None if settings.acceleration.memory == "resident" else settings.max_rows + 1
        self._sizes = settings.engine.sizes or (MINIATURE_SIZES if settings.preset == "miniature" else SIZES)
        self._compiled = compile_mode(settings, uncond.device)
        self._curves = Curves()
        self._folded: Cache[PreparedIdentity] = folded_cache(settings, lambda identity: identity.nbytes)
        self.painter = FluxPainter(
            *(flux, vae, uncond, models, self._folded, self._curves),
            shift=shift,
            max_rows=settings.max_rows,
            step_cache=settings.acceleration.step_cache,
        )

    @classmethod
    def load(cls, settings: Settings, around: "Callable[[IdentityFlux], IdentityFlux]" = lambda flux: flux) -> Self:
        """Read the networks from the preset's files; raises WeightsError, SettingsInvalid.

        `around` may put another FLUX in the place of the loaded one: that of several GPUs.
        """
        import torch

        from pipeline import acceleration, checkpoints
        from pipeline.weights import PRESETS

        acceleration.check(settings)  # before anything is read, which takes minutes
        files, sizes = checkpoints.files(settings), checkpoints.sizes(settings)
        with torch.inference_mode():
            uncond = checkpoints.load_idformer(files, settings).unconditional(sizes.face_tokens)
        flux, vae = load_flux(settings), checkpoints.load_vae(files, settings)
        acceleration.apply(flux, vae, settings)
        models, shift = files.hashes("flux", "vae", "pulid"), PRESETS[settings.preset].shift
        return cls(around(flux), vae, uncond, models, shift, settings)

    def denoise(  # noqa: PLR0913 - what belongs to the picture, and its end
        self,
        request: Request,
        number: int,
        text: Text,
        negative: Text | None,
        *identities: Identity,
        expires: float | None = None,
        on_step: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Picture:
        """Picture `number` of a request that has a seed; `identities` are those of its people, in order.

        From `expires` on (seconds since 1970) it raises DeadlineExceeded. `on_step(done, total)` is called after every
        step. `cancelled` is asked before every step, and makes it raise Cancelled. Raises MaskUnreadable, and
        PictureInvalid where the numbers are no picture.
        """
        engine = Engine(self.painter, self._curves, max_jobs=1, max_rows=1)
        work = Work(request, number, text, negative, identities)
        picture: Picture = draw(engine, work, on_step, cancelled, expires)
        return picture

    def purge(self) -> None:
        """Forget folded identities whose time is over."""
        self._folded.purge()

    def check(self) -> None:
        """Raises WorkerUnavailable where it can draw no more, as a GPU that it shares its work with is gone."""
        self._flux.check()

    def compiler_idle_seconds(self) -> float:
        """Seconds since torch.compile last worked: 0 while it does, infinity before it ever has."""
        from pipeline.compiling import clock

        return clock.idle_seconds()

    def engine(self) -> Engine:
        """An engine for many pictures at once; its steps are compiled first, and how long they take is measured."""
        from pipeline.rehearsal import dry_passes, warm_up

        settings = self._settings
        shapes = [self.painter.shape_of(width, height, TEXT_TOKENS) for width, height in map(pixels, self._sizes)]
        warm_up(self._flux, self._uncond, dry_passes(self._compiled, shapes, self._max_rows))
        # Compiled whole, each number of rows would be one more graph, of minutes; what is not measured is not used.
        self._curves.measure(self.painter.seconds, shapes, 1 if self._compiled == "whole" else self._max_rows)
        return Engine(
            self.painter,
            self._curves,
            settings.max_jobs,
            self._max_rows,
            settings.preview_steps,
            max_begun=self._max_begun,
        )


def load_flux(settings: Settings) -> "IdentityFlux":
    """Read FLUX and PuLID's cross-attentions from the preset's files; raises WeightsError, SettingsInvalid."""
    from pipeline import acceleration, checkpoints, quantised
    from pipeline.models.flux import IdentityFlux
    from pipeline.weights import PRESETS

    acceleration.check(settings)
    files, sizes = checkpoints.files(settings), checkpoints.sizes(settings)
    preset, transformer = PRESETS[settings.preset], checkpoints.load_flux(files, settings)
    if bool(transformer.config.guidance_embeds) != preset.guidance:
        raise WeightsCorrupt(
            f"{files.path('flux')} is not the FLUX of the preset {preset.name}: only dev models have a guidance "
            "embedding, schnell has none; set PULID_PRESET to the preset that fits the file."
        )
    lean = settings.acceleration.memory != "resident"
    attentions = checkpoints.load_cross_attentions(files, checkpoints.on_host(settings) if lean else settings)
    made = quantised.modulation_mode(settings, checkpoints.device(settings))
    try:
        return IdentityFlux(transformer, attentions, sizes.double_interval, sizes.single_interval, made)
    except ValueError as error:
        raise WeightsCorrupt(f"{files.path('flux')} is no FLUX.1 that PuLID fits: {error}.") from error


def draw(
    engine: Engine,
    work: Work,
    on_step: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    expires: float | None = None,
) -> Any:
    """The picture of one work, with an engine that has no other; raises what it failed with."""
    ended: list[Done | Failed] = []

    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and on_step is not None:
            on_step(event.done, event.total)
        elif isinstance(event, Done | Failed):
            ended.append(event)

    ticket = engine.submit(work, listen, seconds=math.inf if expires is None else expires - time.time())
    while not ended:
        if cancelled is not None and cancelled():
            engine.cancel(ticket)
        if not engine.step():
            engine.finish()
    if isinstance(ended[0], Failed):
        raise ended[0].error
    return ended[0].picture


def pixels(size: str) -> tuple[int, int]:
    """WIDTHxHEIGHT as two numbers."""
    width, height = size.split("x")
    return int(width), int(height)

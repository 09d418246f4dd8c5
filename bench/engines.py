"""Engines over FLUX with random weights, and the pictures that are submitted to them."""

import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.models import D64, D512, FLUX, ID_TOKENS, Size, cross_attentions, id_tokens, transformer
from pipeline.caches import Cache
from pipeline.curves import Curves, Shape
from pipeline.drawing import Drawing, Work
from pipeline.engine import Engine
from pipeline.events import Done, Event, Failed, Stepped
from pipeline.faces import FaceBox
from pipeline.identity import Identity
from pipeline.painter import FluxPainter
from pipeline.request import Person, Photo, Request
from pipeline.text import Text
from pipeline.trace import Trace

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    from pipeline.models.flux import IdentityFlux

MAX_ROWS = 8
MAX_JOBS = 10_000  # none is refused: it is the queue that is measured


@dataclass(frozen=True, slots=True)
class Bench:
    """A model with the pictures that are drawn with it: square, `edge` pixels, `text` T5 tokens, `steps` steps."""

    name: str
    size: Size
    vae_levels: int
    edge: int
    text: int
    steps: int

    @property
    def grid(self) -> int:
        """Rows, and columns, of image tokens."""
        return self.edge // 2**self.vae_levels


GAINS = Bench("width 64, 64 image tokens", D64, 5, 256, 32, 28)
GAINS_NOTHING = Bench("width 512, 256 image tokens", D512, 4, 256, 32, 2)
# On a GPU: FLUX's own size, where few tokens leave it idle and many do not.
TRUE_SMALL = Bench("FLUX.1's size, 512 x 512", FLUX, 4, 512, 128, 4)
TRUE_LARGE = Bench("FLUX.1's size, 1024 x 1024", FLUX, 4, 1024, 128, 4)


def benches(device: str) -> tuple[Bench, Bench]:
    """One in which rows that share a pass gain something, and one in which they do not."""
    return (TRUE_SMALL, TRUE_LARGE) if device == "cuda" else (GAINS, GAINS_NOTHING)


class LatentPainter(FluxPainter):
    """One whose pictures are their latents: bytes of a PNG would hide small differences, and take time."""

    def finish(self, drawing: Drawing) -> Any:
        """The latents (1, N, 64) float32."""
        return drawing.latents


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """What painters share: FLUX, the same with identities, an autoencoder, and the identity tokens of nobody."""

    plain: "FluxTransformer2DModel"
    flux: "IdentityFlux"
    vae: "AutoencoderKL"
    uncond: "torch.Tensor"

    def painter(self, curves: Curves, max_rows: int = MAX_ROWS) -> LatentPainter:
        """A painter of its own over these networks."""
        folded: Cache[Any] = Cache(1 << 33, size=lambda identity: identity.nbytes)
        return LatentPainter(self.flux, self.vae, self.uncond, {}, folded, curves, max_rows=max_rows)

    def engine(self, curves: Curves, max_rows: int = MAX_ROWS) -> Engine:
        """An engine over a painter of its own, which refuses nobody."""
        return Engine(self.painter(curves, max_rows), curves, max_jobs=MAX_JOBS, max_rows=max_rows)

    def curves(self, job: Work) -> Curves:
        """What an engine knows after its start-up of pictures like this one."""
        found = Curves()
        painter = self.painter(found)
        found.measure(painter.seconds, [painter.shape(job)], MAX_ROWS)
        return found


def networks(bench: Bench, device: str) -> Networks:
    """Random ones; what earlier ones took is free before."""
    from pipeline.models.flux import IdentityFlux

    gc.collect()
    plain = transformer(bench.size, device)
    flux = IdentityFlux(plain, cross_attentions(bench.size, device))
    return Networks(plain, flux, autoencoder(bench.vae_levels, device), id_tokens(bench.size, device, seed=99))


def autoencoder(levels: int, device: str) -> "AutoencoderKL":
    """A very small one; nothing that is measured here decodes with it."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(4)
    return (
        AutoencoderKL(
            block_out_channels=(4, 4, 8, 8, 8)[:levels],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=2,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        .eval()
        .requires_grad_(requires_grad=False)
        .to(device)
    )


def work(bench: Bench, seed: int = 0, people: int = 1, **fields: Any) -> Work:
    """A picture to draw; `id_weight`, `start_step` and `end_step` are its people's, other fields the request's."""
    own = {name: fields.pop(name) for name in ("id_weight", "start_step", "end_step") if name in fields}
    person = Person(photos=(Photo(base64=""),), **own)
    request = Request(
        prompt="a portrait", people=(person,) * people, width=bench.edge, height=bench.edge, seed=seed, **fields
    )
    identities = tuple(_identity(bench.size, 10 * seed + index) for index in range(people))
    negative = _text(bench, seed + 5000) if request.uses_true_cfg else None
    return Work(request.without_photos(), 0, _text(bench, seed), negative, identities)


def _text(bench: Bench, seed: int) -> Text:
    draws = np.random.default_rng(seed)
    tokens = draws.standard_normal((bench.text, bench.size.joint_attention_dim), dtype=np.float32)
    pooled = draws.standard_normal(bench.size.pooled_projection_dim, dtype=np.float32)
    return Text(tokens, pooled, False, Trace())


def _identity(size: Size, seed: int) -> Identity:
    tokens = np.random.default_rng(seed).standard_normal((ID_TOKENS, size.kv_dim), dtype=np.float32)
    return Identity(tokens, (FaceBox(0, (1.0, 2.0, 3.0, 4.0), 0.9),), Trace())


class Always(Curves):
    """The rule's opposite: as many rows together as there are."""

    def best_jobs(self, shape: Shape, rows: Sequence[int], max_rows: int) -> int:  # noqa: ARG002 - the shape plays no part
        """All of them."""
        return min(len(rows), max_rows)

    def width(self, shape: Shape, rows: int, max_rows: int) -> int:  # noqa: ARG002
        """As many as there are, or may be."""
        return min(rows, max_rows)


@dataclass(slots=True)
class Heard:
    """What one picture's listener heard: moments of its arrival, its first step's end and its own, and the result."""

    submitted: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    ended: float = 0.0
    result: Any = None

    @property
    def latency(self) -> float:
        """Seconds from its arrival to its end."""
        return self.ended - self.submitted

    @property
    def waited(self) -> float:
        """Seconds from its arrival to the end of its first step."""
        return self.first - self.submitted

    def __call__(self, event: Event) -> None:
        """Note the event; raises why there is no picture."""
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            self.ended, self.result = time.perf_counter(), event.picture
        elif isinstance(event, Stepped) and event.done == 1:
            self.first = time.perf_counter()


def drain(running: Engine) -> None:
    """All steps and all endings of what is in an engine."""
    while running.step() or running.finish():
        while running.finish():
            pass


def together(running: Engine, works: Sequence[Work]) -> list[Heard]:
    """Pictures submitted at once and drawn to their ends."""
    heard = [Heard() for _ in works]
    for one, listener in zip(works, heard, strict=True):
        running.submit(one, listener)
    drain(running)
    return heard


def arriving(
    running: Engine, works: Sequence[Work], moments: Sequence[float], whole_requests: bool = False
) -> list[Heard]:
    """Pictures that arrive at given seconds from now, each told from its arrival on.

    With `whole_requests` a picture is let in only when the engine is empty: what serving request by request is.
    """
    started, heard = time.perf_counter(), []
    coming, waiting = deque(zip(works, moments, strict=True)), deque[tuple[Work, Heard]]()
    while coming or waiting or any(not one.ended for one in heard):
        while coming and started + coming[0][1] <= time.perf_counter():
            one, moment = coming.popleft()
            waiting.append((one, Heard(submitted=started + moment)))
        while waiting and not (whole_requests and any(not one.ended for one in heard)):
            one, listener = waiting.popleft()
            heard.append(listener)
            running.submit(one, listener)
        if not running.step() and not running.finish() and coming:
            time.sleep(max(0.0, started + coming[0][1] - time.perf_counter()))
        while running.finish():
            pass
    return heard

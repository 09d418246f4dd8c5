"""The networks of a training: which are trained, which only lend their gradient, and the files that come of it."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.models.flux import IdentityFlux
from pipeline.models.pulid import IDFormer, PulidCrossAttention
from pipeline.tensors import write_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from pipeline.face_models import Finder
    from pipeline.models.eva_clip import EvaClip

# Pictures (B, 3, H, W) in -1..1 -> five landmarks (5, 2) in pixels for each, or None where no face is found
Locate = Callable[[Tensor], Sequence[NDArray[np.float32] | None]]


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """All networks on one device. Trained are `idformer` and the cross-attentions in `flux`, in float32; the others
    are frozen, in any dtype.

    vae, recogniser (face crops (B, 3, 112, 112) in -1..1 -> (B, E)) and locate: for the ID loss. eva_clip: for examples
    that hold features.
    """

    flux: IdentityFlux
    idformer: IDFormer
    vae: "AutoencoderKL | None" = None
    eva_clip: "EvaClip | None" = None
    recogniser: nn.Module | None = None
    locate: Locate | None = None

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.idformer.proj_out.device

    def cross_attentions(self) -> list[PulidCrossAttention]:
        """Those in FLUX, in the order of their numbers."""
        transformer = self.flux.transformer
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        return [block.cross_attention for block in blocks if block.cross_attention is not None]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters under the names of PuLID's file."""
        named = {f"pulid_encoder.{name}": weight for name, weight in self.idformer.named_parameters()}
        for number, module in enumerate(self.cross_attentions()):
            named |= {f"pulid_ca.{number}.{name}": weight for name, weight in module.named_parameters()}
        return named

    def prepare(self, gradient_checkpointing: bool = False) -> None:
        """Freeze all but what is trained, and switch dropout off; save memory by computing twice if asked."""
        everything = (self.flux, self.idformer, self.vae, self.eva_clip, self.recogniser)
        for network in everything:
            if network is not None:
                network.eval().requires_grad_(False)
        for weight in self.trainable().values():
            weight.requires_grad_(True)
        if gradient_checkpointing:
            self.flux.transformer.enable_gradient_checkpointing()
            if self.vae is not None:
                self.vae.enable_gradient_checkpointing()


def new_pulid(
    count: int, idformer: Mapping[str, int], cross_attention: Mapping[str, int], seed: int = 0
) -> tuple[IDFormer, list[PulidCrossAttention]]:
    """An untrained IDFormer and `count` cross-attentions that add nothing yet: their last layers are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = IDFormer(**idformer)
        modules = [PulidCrossAttention(**cross_attention) for _ in range(count)]
    for module in modules:
        nn.init.zeros_(module.to_out.weight)
    return encoder, modules


def save_pulid(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Write trained weights as `pulid_flux_*.safetensors` is written: official names and dtype; atomically."""
    write_tensors(path, {name: weight.detach().to("cpu", dtype) for name, weight in weights.items()})


def locate_with(finder: "Finder") -> Locate:
    """Landmarks of the largest face that a detector finds in each picture."""
    from pipeline.models.alignment import area

    def locate(pixels: Tensor) -> list[NDArray[np.float32] | None]:
        found: list[NDArray[np.float32] | None] = []
        for rgb in _as_bytes(pixels):
            faces = finder.find(rgb)
            largest = max(faces, key=lambda face: float(area(face.box)[0]), default=None)
            found.append(None if largest is None else largest.landmarks)
        return found

    return locate


def _as_bytes(pixels: Tensor) -> Iterator[NDArray[np.uint8]]:
    rgb = (127.5 * (pixels.detach().float().clamp(-1, 1) + 1)).byte().permute(0, 2, 3, 1)
    return iter(np.ascontiguousarray(rgb.cpu().numpy()))


class Ema:
    """A running mean of the trained weights, which is what is kept in the end.

    Young means forget faster: a start that is far from the end would otherwise stay in them for long.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = {name: copy.deepcopy(weight.detach()) for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights that step number `step` (from 0) ended with."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, mean in self.weights.items():
            mean.lerp_(weights[name].detach(), 1 - decay)

"""FLUX at the sizes that are measured, with random weights: nothing is downloaded."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from diffusers import FluxTransformer2DModel
    from torch import nn

    from pipeline.models.flux import IdentityFlux
    from pipeline.models.pulid import PulidCrossAttention

ID_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Size:
    """A FLUX: its blocks, its heads, the widths of what it reads, and the identity's width."""

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    axes_dims_rope: tuple[int, int, int]
    joint_attention_dim: int
    pooled_projection_dim: int
    kv_dim: int

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def config(self) -> dict[str, Any]:
        """FluxTransformer2DModel's arguments."""
        kept = {name: value for name, value in asdict(self).items() if name != "kv_dim"}
        return {**kept, "patch_size": 1, "in_channels": 64, "guidance_embeds": True}


_WIDE = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
_WIDE |= {"joint_attention_dim": 4096, "pooled_projection_dim": 768, "kv_dim": 2048}
FLUX = Size(num_layers=19, num_single_layers=38, **_WIDE)  # FLUX.1-dev
SLICE = Size(num_layers=2, num_single_layers=4, **_WIDE)  # six of its blocks, with two cross-attentions
D64 = Size(2, 4, 4, 16, (4, 6, 6), 64, 32, 32)  # batching gains on a CPU
D512 = Size(2, 4, 8, 64, (16, 24, 24), 64, 32, 32)  # batching gains nothing on a CPU


def transformer(size: Size, device: str, seed: int = 0) -> "FluxTransformer2DModel":
    """Random weights, made on the device; bfloat16 on a GPU, float32 on a CPU, no memory at all on `meta`."""
    from diffusers import FluxTransformer2DModel

    with _made(device, seed):
        return FluxTransformer2DModel(**size.config).eval().requires_grad_(requires_grad=False)


def cross_attentions(size: Size, device: str, seed: int = 1) -> "list[PulidCrossAttention]":
    """One after every second double and every fourth single block; their norms have gains and offsets, as trained."""
    import torch

    from pipeline.models.pulid import PulidCrossAttention

    count = -(-size.num_layers // 2) + -(-size.num_single_layers // 4)
    inner = (128, 16) if size.dim == FLUX.dim else (16, 2)
    with _made(device, seed):
        made = [PulidCrossAttention(size.dim, *inner, size.kv_dim) for _ in range(count)]
        for module in made:
            module.requires_grad_(requires_grad=False)
            for norm in (module.norm1, module.norm2):
                torch.nn.init.normal_(norm.weight, 1.0, 0.2)
                torch.nn.init.normal_(norm.bias, 0.0, 0.2)
    return made


def identity_flux(size: Size, device: str, modulation: str = "live") -> "IdentityFlux":
    """FLUX with identities."""
    from pipeline.models.flux import IdentityFlux

    return IdentityFlux(transformer(size, device), cross_attentions(size, device), modulation=modulation)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The inputs of one step of IdentityFlux: image tokens (B, N, 64), times (B,), guidance (B,), text, pooled, ids."""

    latents: "torch.Tensor"
    times: "torch.Tensor"
    guidance: "torch.Tensor"
    text: "torch.Tensor"
    pooled: "torch.Tensor"
    ids: "torch.Tensor"

    @property
    def all(self) -> "Sequence[torch.Tensor]":
        """In the order of IdentityFlux.forward."""
        return self.latents, self.times, self.guidance, self.text, self.pooled, self.ids


def inputs(size: Size, device: str, rows: int, grid: tuple[int, int], text_tokens: int) -> Inputs:
    """Random inputs; the rows differ in time and guidance too."""
    import torch

    from pipeline.models.sampling import image_ids

    with _made(device, 2):
        return Inputs(
            torch.randn(rows, grid[0] * grid[1], 64),
            torch.linspace(0.9, 0.1, rows, dtype=torch.float32),
            torch.linspace(3.0, 5.0, rows, dtype=torch.float32),
            torch.randn(rows, text_tokens, size.joint_attention_dim),
            torch.randn(rows, size.pooled_projection_dim),
            image_ids(*grid).to(device),
        )


def id_tokens(size: Size, device: str, seed: int = 3) -> "torch.Tensor":
    """The identity tokens of somebody (1, 32, kv_dim)."""
    import torch

    with _made(device, seed):
        return torch.randn(1, ID_TOKENS, size.kv_dim)


def nbytes(module: "nn.Module") -> int:
    """Bytes of a module's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@contextmanager
def _made(device: str, seed: int) -> "Iterator[None]":
    """What is made inside is made on the device, in its dtype, from a seed."""
    import torch

    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)

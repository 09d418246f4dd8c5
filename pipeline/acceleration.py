"""Levers on a loaded FLUX: compiling, the attention backend, the autoencoder's memory format; `acceleration.*`.

What has to happen while weights are read (float8, 4 bits, host memory) is in quantised.py; several GPUs for one picture
are in context_parallel.py.
"""

import os
import shutil
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from pipeline.errors import SettingsInvalid
from pipeline.models.flux import IdentityFlux
from pipeline.models.folding import folded_attention
from pipeline.models.modulation import NORMS, TableSlice, view_of
from pipeline.settings import Settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Graphs of one function: sizes, text lengths, rows of a pass and people each may ask for one more. torch's own limit of
# 8 is soon reached, and beyond it a request would fail.
GRAPHS = 64


def apply(flux: IdentityFlux, vae: "AutoencoderKL | None", settings: Settings) -> None:
    """Pull the levers that are set, in place; no VAE where nothing is decoded. Raises SettingsInvalid."""
    chosen = settings.acceleration
    check(settings)
    if chosen.attention != "native":
        set_attention(flux, chosen.attention)
    mode = compile_mode(settings, flux.transformer.x_embedder.weight.device)
    if mode != "off":
        compile_flux(flux, mode)
    if vae is not None and chosen.vae_channels_last:
        vae.to(memory_format=torch.channels_last)


def check(settings: Settings) -> None:
    """Raises SettingsInvalid where levers exclude each other."""
    chosen = settings.acceleration
    if chosen.compile == "whole" and chosen.step_cache:
        raise SettingsInvalid(
            "PULID_ACCELERATION__COMPILE=whole has no place for PULID_ACCELERATION__STEP_CACHE, which decides in every "
            "step; set COMPILE to regional, or STEP_CACHE to 0."
        )
    if chosen.compile not in ("auto", "off") and chosen.memory in ("cast", "gguf", "nf4"):
        raise SettingsInvalid(
            f"PULID_ACCELERATION__COMPILE does not go with PULID_ACCELERATION__MEMORY={chosen.memory}; set COMPILE to "
            "off, or MEMORY to resident or lean."
        )
    if chosen.compile == "whole" and chosen.context_parallel > 1:
        raise SettingsInvalid(
            "PULID_ACCELERATION__COMPILE=whole does not go with PULID_ACCELERATION__CONTEXT_PARALLEL, whose GPUs talk "
            "in every block; set COMPILE to regional or off, or CONTEXT_PARALLEL to 1."
        )
    if chosen.context_parallel > 1 and chosen.step_cache:
        raise SettingsInvalid(
            "With PULID_ACCELERATION__CONTEXT_PARALLEL each GPU sees a part of the tokens and would decide on its own "
            "which steps to skip; set PULID_ACCELERATION__STEP_CACHE to 0, or CONTEXT_PARALLEL to 1."
        )


def compile_mode(settings: Settings, device: torch.device) -> Literal["off", "regional", "whole"]:
    """What to compile: as set, or blocks on a GPU whose weights have one form and whose machine has a C compiler."""
    chosen = settings.acceleration
    if chosen.compile != "auto":
        return chosen.compile
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    possible = device.type == "cuda" and chosen.memory in ("resident", "lean") and compiler is not None
    return "regional" if possible else "off"


def set_attention(flux: IdentityFlux, backend: str) -> None:
    """Compute FLUX's attention by one of diffusers' backends. Raises SettingsInvalid."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted(name.value for name in AttentionBackendName if not name.value.endswith("_hub"))
    if backend not in known:  # those that end in _hub would fetch programs from the internet, and run them
        raise SettingsInvalid(f"PULID_ACCELERATION__ATTENTION is {backend}; set it to one of {', '.join(known)}.")
    try:
        flux.transformer.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise SettingsInvalid(
            f"PULID_ACCELERATION__ATTENTION is {backend}, which cannot be used here: {error} Set it to native."
        ) from error


def compile_flux(flux: IdentityFlux, mode: Literal["regional", "whole"], backend: str = "inductor") -> None:
    """Compile FLUX in place with torch.compile: `regional`, its blocks one by one, or `whole`, for fixed sizes.

    Regional: one graph serves all blocks of a kind, and the second picture size makes it one for any size. Whole: one
    graph for each size, text length, number of rows and of people, each compiled for minutes at its first use, and the
    cross-attentions with it. The transformer that FLUX was made from is not changed.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    if mode == "whole":
        flux.transformer.compile(fullgraph=True, dynamic=False, backend=backend)
        return
    attend = torch.compile(folded_attention, fullgraph=True, backend=backend)
    for wrapped in (*flux.transformer.transformer_blocks, *flux.transformer.single_transformer_blocks):
        reads_table = any(isinstance(module, TableSlice) for module in wrapped.block.modules())
        outer = OwnRow(wrapped.block) if reads_table else None
        block = view_of(wrapped.block) if outer is None else outer.block
        block.compile(fullgraph=True, backend=backend)
        wrapped.block = block if outer is None else outer
        wrapped.attend = attend


class OwnRow(nn.Module):
    """A block that reads a table of modulations, and is handed its own part of the row only.

    Where its part begins is a number that differs from block to block, and compiled along it would make a graph for
    each; inside, all blocks of a kind are now alike.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        slices = [module for module in block.modules() if isinstance(module, TableSlice)]
        self.start = min(part.start for part in slices)
        self.stop = max(part.stop for part in slices)
        norms = {name: getattr(block, name) for name in NORMS if hasattr(block, name)}
        self.block = view_of(block, **{name: view_of(norm, linear=self._moved(norm)) for name, norm in norms.items()})

    def _moved(self, norm: nn.Module) -> TableSlice:
        part = cast(TableSlice, norm.linear)
        return TableSlice(part.start - self.start, part.stop - self.start)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block's own; temb is the whole row (B, W)."""
        own = temb[:, self.start : self.stop]
        return self.block(  # type: ignore[no-any-return]
            hidden_states, encoder_hidden_states, own, image_rotary_emb, joint_attention_kwargs
        )

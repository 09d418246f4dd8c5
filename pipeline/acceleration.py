"""Levers on a loaded FLUX: the attention backend, torch.compile, the autoencoder's memory format; `acceleration.*`.

How FLUX is compiled is in compiling.py, what has to happen while weights are read (float8, 4 bits, host memory) in
quantised.py, and several GPUs for one picture in context_parallel.py.
"""

from typing import TYPE_CHECKING, Literal

import torch

from pipeline import checkpoints, quantised
from pipeline.compiling import compile_flux, has_compiler
from pipeline.errors import SettingsInvalid
from pipeline.models.flux import IdentityFlux
from pipeline.settings import AccelerationSettings, Settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def apply(flux: IdentityFlux, vae: "AutoencoderKL | None", settings: Settings) -> None:
    """Pull the levers that are set, in place; no VAE where nothing is decoded. Raises SettingsInvalid."""
    chosen = settings.acceleration
    check(settings)
    set_attention(flux, chosen.attention)
    mode = compile_mode(settings, flux.transformer.x_embedder.weight.device)
    if mode != "off":
        compile_flux(flux, mode)
    if vae is not None and chosen.vae_channels_last:
        vae.to(memory_format=torch.channels_last)


def check(settings: Settings) -> None:
    """Raises SettingsInvalid where levers exclude each other, or this machine lacks what they need; reads no weights.

    Several GPUs take an attention backend that diffusers' registry knows to exchange its heads: each of the others
    would leave every rank with its own tokens, and give another picture without an error.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    chosen = settings.acceleration
    _check_exclusions(chosen)
    if chosen.step_cache and (settings.engine.max_rows or 1) > 1:
        raise SettingsInvalid(
            "PULID_ACCELERATION__STEP_CACHE decides row by row which steps to skip, and so draws one row a pass; leave "
            "PULID_ENGINE__MAX_ROWS out, or set it to 1."
        )
    known = sorted(name.value for name in AttentionBackendName if not name.value.endswith("_hub"))
    if chosen.attention not in known:  # those that end in _hub would fetch programs from the internet, and run them
        raise SettingsInvalid(
            f"PULID_ACCELERATION__ATTENTION is {chosen.attention}; set it to one of {', '.join(known)}."
        )
    able = sorted(_AttentionBackendRegistry._supports_context_parallel.intersection(known))
    if chosen.context_parallel > 1 and chosen.attention not in able:
        raise SettingsInvalid(
            f"PULID_ACCELERATION__ATTENTION={chosen.attention} does not go with PULID_ACCELERATION__CONTEXT_PARALLEL; "
            f"set ATTENTION to one of {', '.join(able)}, or CONTEXT_PARALLEL to 1."
        )
    _check_installed(chosen.attention)
    if chosen.compile not in ("auto", "off") and not has_compiler():
        raise SettingsInvalid(
            f"PULID_ACCELERATION__COMPILE={chosen.compile} needs a C compiler; install one, or set it to off."
        )
    quantised.check(settings, checkpoints.device(settings))


def _check_exclusions(chosen: AccelerationSettings) -> None:
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
    possible = device.type == "cuda" and chosen.memory in ("resident", "lean") and has_compiler()
    return "regional" if possible else "off"


def set_attention(flux: IdentityFlux, backend: str) -> None:
    """Compute FLUX's attention by one of diffusers' backends, whichever its own variable names for the process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active, _ = _AttentionBackendRegistry.get_active_backend()
    if not (backend == active.value == "native"):
        flux.transformer.set_attention_backend(backend)


def _check_installed(backend: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    try:
        _check_attention_backend_requirements(AttentionBackendName(backend))
    except (ImportError, RuntimeError, ValueError) as error:
        raise SettingsInvalid(
            f"PULID_ACCELERATION__ATTENTION is {backend}, which cannot be used here: {error} Set it to native."
        ) from error

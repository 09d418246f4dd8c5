"""Quantised forms of FLUX, and what of it stays in host memory: `acceleration.memory` and `acceleration.fp8`.

One rule for every form: only the blocks' own linear layers get narrower. Embedders, norms with their modulation, the
last projection and PuLID's cross-attentions stay as they are; likeness suffers first where these are rounded. (GGUF is
the exception: its file says itself what is quantised.)
"""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from pipeline.errors import SettingsInvalid
from pipeline.models import single_file
from pipeline.settings import Settings

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

SMALL_CARD = 40e9  # bytes, below which FLUX in bfloat16 needs its modulation weights elsewhere
FP8_CAPABILITY = (8, 9)  # NVIDIA Ada, the first with float8 products
# attention's and the feed-forward's projections, by diffusers' names
BLOCK_LINEAR = re.compile(
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
MODULATION = re.compile(r"time_text_embed\..+|(.+\.)?norm\w*\.linear")


def block_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that may be quantised, by name: 8.6 of FLUX.1's 11.9 billion parameters."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and BLOCK_LINEAR.fullmatch(name)
    }


def is_gguf(path: Path) -> bool:
    """Whether a file's name says that it is in GGUF."""
    return path.suffix == ".gguf"


def check(settings: Settings, device: torch.device) -> None:
    """Raises SettingsInvalid where settings contradict each other, or device or installation lack what they need."""
    chosen = settings.acceleration
    gguf = settings.flux_file is not None and is_gguf(settings.flux_file)
    if gguf != (chosen.memory == "gguf"):
        raise SettingsInvalid(
            "PULID_ACCELERATION__MEMORY=gguf and a PULID_FLUX_FILE that ends in .gguf go together; set both or neither."
        )
    if chosen.memory != "resident" and settings.engine.modulation not in ("auto", "host"):
        raise SettingsInvalid(
            f"PULID_ACCELERATION__MEMORY={chosen.memory} keeps the modulation weights in host memory; set "
            "PULID_ENGINE__MODULATION to auto or host."
        )
    if chosen.fp8:
        if chosen.memory not in ("resident", "lean"):
            raise SettingsInvalid(
                f"PULID_ACCELERATION__FP8 and PULID_ACCELERATION__MEMORY={chosen.memory} quantise the same layers; "
                "set MEMORY to resident or lean, or FP8 to false."
            )
        if settings.dtype not in ("auto", "bfloat16"):
            raise SettingsInvalid(
                f"PULID_ACCELERATION__FP8 multiplies bfloat16 only, and PULID_DTYPE is {settings.dtype}; set it to "
                "auto or bfloat16, or FP8 to false."
            )
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            raise SettingsInvalid(
                "PULID_ACCELERATION__FP8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, "
                "Blackwell); set it to false, or PULID_ACCELERATION__MEMORY=cast to save memory only."
            )
        optional("torchao.quantization", "PULID_ACCELERATION__FP8", "fp8")
    if chosen.memory == "nf4":
        optional("bitsandbytes.nn", "PULID_ACCELERATION__MEMORY=nf4", "nf4")


def modulation_mode(settings: Settings, device: torch.device) -> Literal["live", "table", "host"]:
    """How FLUX's modulation is made: as set, or in each step, but for cards too small to hold its weights."""
    if settings.acceleration.memory != "resident":
        return "host"
    if settings.engine.modulation != "auto":
        return settings.engine.modulation
    if device.type != "cuda":
        return "live"
    return "host" if torch.cuda.get_device_properties(device).total_memory < SMALL_CARD else "live"


def reads_on_host(settings: Settings, device: torch.device) -> bool:
    """Whether FLUX is read into host memory first, as the device is not to hold all of it in the form of its file."""
    return settings.acceleration.fp8 or modulation_mode(settings, device) == "host"


def place(transformer: "FluxTransformer2DModel", device: torch.device, settings: Settings) -> None:
    """Bring a transformer, in place, into the form and to the device that are set; it may lie in host memory.

    Layer by layer, so that the card never holds more than the form it ends with. Raises SettingsInvalid where a library
    is missing.
    """
    chosen = settings.acceleration
    dtype = transformer.x_embedder.weight.dtype
    for name, linear in block_linears(transformer).items():
        if chosen.fp8:
            to_fp8(linear.to(device))
        elif chosen.memory == "cast":
            to_cast(linear, dtype)
        elif chosen.memory == "nf4":
            transformer.set_submodule(name, to_nf4(linear, device, dtype))
    staying = set(modulation(transformer).values()) if modulation_mode(settings, device) == "host" else set()
    for module in transformer.modules():
        if module not in staying and not any(True for _ in module.children()):
            module.to(device)


def modulation(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers, by name, that only turn time, guidance and pooled prompt into shifts, scales and gates."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and MODULATION.fullmatch(name)
    }


def optional(module: str, setting: str, extra: str) -> Any:
    """A module of a library that only this setting needs; raises SettingsInvalid where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsInvalid(
            f"{setting} needs {module.partition('.')[0]}, which cannot be imported here; install pulid-serve[{extra}], "
            "or change the setting."
        ) from error


def to_fp8(linear: nn.Linear) -> None:
    """Weights and, in every call, activations of a layer in float8, each row with a scale of its own (torchao)."""
    torchao = optional("torchao.quantization", "PULID_ACCELERATION__FP8", "fp8")
    form = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    torchao.quantize_(linear, form)


def to_cast(linear: nn.Linear, dtype: torch.dtype) -> None:
    """Weights kept as float8 and widened to `dtype` for the time of each call (diffusers' layerwise casting)."""
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(
        linear,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=dtype,
        skip_modules_pattern=None,  # this very layer
    )


def to_nf4(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A layer on the device whose weights are 4-bit NormalFloat with doubly quantised scales (arXiv 2305.14314, 3).

    bitsandbytes' layer is the one that diffusers' BitsAndBytesConfig puts in too, but only where FLUX is a folder.
    Raises SettingsInvalid.
    """
    layers = optional("bitsandbytes.nn", "PULID_ACCELERATION__MEMORY=nf4", "nf4")
    form = {"compress_statistics": True, "quant_type": "nf4"}
    narrow = layers.Linear4bit(linear.in_features, linear.out_features, False, dtype, device="meta", **form)
    narrow.weight = layers.Params4bit(linear.weight.data, requires_grad=False, **form)
    narrow.bias = linear.bias
    return narrow.to(device).requires_grad_(False)  # type: ignore[no-any-return] # quantised on its way to the device


def load_gguf(path: Path, dtype: torch.dtype) -> "FluxTransformer2DModel":
    """FLUX's transformer in host memory from a GGUF file; what that quantises is widened in every call.

    Raises SettingsInvalid where gguf is not installed, WeightsCorrupt, and what pipeline/models/single_file.py raises.
    """
    from diffusers import FluxTransformer2DModel
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    optional("gguf", "A PULID_FLUX_FILE that ends in .gguf", "gguf")  # which diffusers imports
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    config, state = single_file.translated(load_gguf_checkpoint(str(path)))
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        found = {name: getattr(tensor, "quant_shape", tensor.shape) for name, tensor in state.items()}
        single_file.compare(wanted, found)
        narrow = {**block_linears(model), **modulation(model)}
        for name, linear in narrow.items():
            if isinstance(state[f"{name}.weight"], GGUFParameter):
                model.set_submodule(name, GGUFLinear(linear.in_features, linear.out_features, True, dtype))
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if not (leaf == "weight" and module in narrow and isinstance(tensor, GGUFParameter)):
            tensor = dequantize_gguf_tensor(tensor).to(dtype)
        parameter = tensor if isinstance(tensor, GGUFParameter) else nn.Parameter(tensor, requires_grad=False)
        model.get_submodule(module)._parameters[leaf] = parameter
    return model

"""FLUX in one file: Black Forest Labs' own names and ComfyUI's float8 form -> diffusers' names and configuration.

The configuration is not in such a file; it is read off the tensors' shapes, so that smaller models load too. The names
are translated by diffusers' own converters.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import WeightsCorrupt

State = dict[str, Tensor]

FLUX_PREFIXES = ("model.diffusion_model.",)  # the transformer beside text encoders and VAE, in ComfyUI's checkpoints
VAE_PREFIXES = ("vae.", "first_stage_model.")
SCALE_NAMES = ("scale_weight", "weight_scale")  # ComfyUI's first name for a float8 weight's scale, and its later one
REMARK_NAMES = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")  # for float8 arithmetic; ours is wider
CONVERTER_WIDTH = 3072  # diffusers' converter cuts single blocks at FLUX.1's own width, whatever the tensor's


def flux(state: State, dtype: torch.dtype) -> tuple[dict[str, Any], State]:
    """A FLUX.1 transformer's configuration, and its tensors in `dtype` under diffusers' names; empties `state`.

    Raises WeightsCorrupt where it is quantised in a form that is not read here; KeyError, IndexError, RuntimeError or
    ValueError where tensors are missing or of the wrong shape.
    """
    dequantise(state, dtype)
    return translated(state)


def translated(state: State) -> tuple[dict[str, Any], State]:
    """A FLUX.1 transformer's configuration, and its tensors as they are under diffusers' names; empties `state`.

    Raises KeyError, IndexError, RuntimeError or ValueError where tensors are missing or of the wrong shape.
    """
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = _flux_config(state)
    width = config["attention_head_dim"] * config["num_attention_heads"]
    fused = {key: state.pop(key) for key in list(state) if re.fullmatch(r"single_blocks\.\d+\.linear1\.\w+", key)}
    state.update(dict.fromkeys(fused, torch.empty(7 * CONVERTER_WIDTH, 0)))  # cut by the converter, then replaced
    converted: State = convert_flux_transformer_checkpoint_to_diffusers(state)
    for key in list(fused):
        tensor = fused.pop(key)  # so that the parts never stand beside the whole of more than one block
        _, index, _, leaf = key.split(".")
        parts = torch.split(tensor, [width, width, width, tensor.shape[0] - 3 * width])
        for name, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), parts, strict=True):
            converted[f"single_transformer_blocks.{index}.{name}.{leaf}"] = part.clone()
    return config, {**converted, **state}  # what the converter left over is unknown, and the caller says so


def autoencoder(state: State) -> tuple[dict[str, Any], State]:
    """The configuration of FLUX's autoencoder, and its tensors under diffusers' names.

    Raises KeyError where tensors are missing that the configuration is read from.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = _count(state, "encoder.down")
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(
            state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        ),
        "layers_per_block": _count(state, "encoder.down.0.block"),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "scaling_factor": 0.3611,  # this and the next: black-forest-labs/flux, util.py
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return config, convert_ldm_vae_checkpoint(state, config)


def dequantise(state: State, dtype: torch.dtype) -> None:
    """Turn every tensor into `dtype`, in place, multiplying float8 weights by their scales where they have one.

    A scale is one number, or one per row. Raises WeightsCorrupt for integers: another kind of quantisation.
    """
    for key in [key for key in state if _leaf(key) in REMARK_NAMES]:
        del state[key]
    scales = {key.rpartition(".")[0]: state.pop(key) for key in list(state) if _leaf(key) in SCALE_NAMES}
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise WeightsCorrupt(
                f"{key} holds {tensor.dtype}: a quantised form that is not read here. Take FLUX in bfloat16 or float8."
            )
        scale = scales.pop(key.rpartition(".")[0], None) if _leaf(key) == "weight" else None
        if scale is None:
            state[key] = tensor.to(dtype)
        else:
            rows = scale.float().reshape((-1,) + (1,) * (tensor.ndim - 1))  # (1 or rows, 1, ..)
            state[key] = (tensor.float() * rows).to(dtype)
    if scales:
        raise WeightsCorrupt(f"There are scales without a weight, {next(iter(scales))} for one.")


def compare(wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    """Raises WeightsCorrupt where tensors are missing, unknown or of another shape than a network wants."""
    wrong = {
        "missing": wanted.keys() - found.keys(),
        "unknown": found.keys() - wanted.keys(),
        "of another shape": {key for key in wanted.keys() & found.keys() if wanted[key] != found[key]},
    }
    for problem, keys in wrong.items():
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise WeightsCorrupt(f"{len(keys)} of its {len(found)} tensors are {problem}: {some}")


def _flux_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels = _shape(state["img_in.weight"])
    head = state["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": state["final_layer.linear.weight"].shape[0],
        "num_layers": _count(state, "double_blocks"),
        "num_single_layers": _count(state, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": _shape(state["txt_in.weight"])[1],
        "pooled_projection_dim": _shape(state["vector_in.in_layer.weight"])[1],
        "guidance_embeds": any(key.startswith("guidance_in.") for key in state),
        # not in the file: every head is shared among the axes as FLUX.1's 128 are, 16 to 56 to 56
        "axes_dims_rope": (head // 8, head * 7 // 16, head * 7 // 16),
    }


def _shape(tensor: Tensor) -> torch.Size:
    """Its shape; that of the numbers it stands for where it holds GGUF's packed bytes."""
    return torch.Size(getattr(tensor, "quant_shape", tensor.shape))


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many `prefix.0`, `prefix.1`... there are, going by the highest."""
    numbers = (re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in state)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]

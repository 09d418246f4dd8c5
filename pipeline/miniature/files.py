"""The miniature's weight files, written by rule: no download, under 10 MB, a second or two.

Real models of the real classes in the real file formats, only very small. Every weight is drawn from a random stream
of its own that is seeded with the weight's name, so the files are the same on every machine. Nobody has trained them:
until somebody does, the pictures they make are noise, and only the way to them is real.
"""

import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.download import locked, sha256
from pipeline.errors import WeightsCorrupt, WeightsMissing
from pipeline.manifest import Manifest, write_manifest

if TYPE_CHECKING:
    from torch import Tensor, nn

VERSION = "1"  # another rule or another size is another version: the files are then made anew
MARKER = "made_by_rule.txt"
EVA_CLIP = "eva_clip/EVA02_CLIP_miniature.pt"
PULID = "pulid/pulid_flux_miniature.safetensors"
FLUX: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}
CROSS_ATTENTIONS = 4  # after double blocks 0 and 2, after single blocks 0 and 4
VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 16,
    "scaling_factor": 0.3611,  # FLUX's own, as the shift
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5: Mapping[str, Any] = {
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
CLIP: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}
# timm's names of the tower's weights -> those of the original checkpoint
ORIGINAL_NAMES = (
    (".attn.q_proj.bias", ".attn.q_bias"),
    (".attn.v_proj.bias", ".attn.v_bias"),
    (".attn.norm.", ".attn.inner_attn_ln."),
    (".mlp.fc1_g.", ".mlp.w1."),
    (".mlp.fc1_x.", ".mlp.w2."),
    (".mlp.norm.", ".mlp.ffn_ln."),
    (".mlp.fc2.", ".mlp.w3."),
)


def make(folder: Path) -> None:
    """Write the files and their manifest into `folder`, unless they are there already and are what they should be.

    Several processes may ask at once: one writes, the others wait. The folder appears under its name only when it is
    complete. Raises WeightsMissing where it cannot be written.
    """
    if _is_current(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            if not _is_current(folder):
                _replace(folder)
    except OSError as error:
        raise WeightsMissing(
            f"The miniature's files cannot be written to {folder} ({error.strerror or error}); "
            "set PULID_WEIGHTS_DIR to a folder that can be written."
        ) from error


def _is_current(folder: Path) -> bool:
    try:
        entries = Manifest.read(folder).entries
        return (
            (folder / MARKER).read_text() == VERSION
            and MARKER in entries
            and all(
                # reading them is the second choice: copied files are right too, only their times are not
                entry.is_unchanged(folder / name) or sha256(folder / name) == entry.sha256
                for name, entry in entries.items()
            )
        )
    except (OSError, WeightsCorrupt):  # not made yet, or damaged: making it anew says what is wrong
        return False


def _replace(folder: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh = work / "fresh"
        fresh.mkdir()
        write(fresh)
        write_manifest(fresh)
        if folder.exists():
            os.rename(folder, work / "stale")
        os.rename(fresh, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write(folder: Path) -> None:
    """Write every file of the miniature into an empty folder."""
    _write_flux(folder)
    _write_text_encoders(folder)
    _write_identity(folder)
    (folder / MARKER).write_text(VERSION)


def _write_flux(folder: Path) -> None:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    _fill(FluxTransformer2DModel(**FLUX), "flux.").save_pretrained(folder / "flux")
    _fill(AutoencoderKL(**VAE), "vae.").save_pretrained(folder / "vae")


def _write_text_encoders(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from pipeline.miniature import tokenizers

    pieces = len(tokenizers.t5_vocabulary())
    t5 = T5EncoderModel(T5Config(**T5, vocab_size=pieces))
    _save_transformer(_fill(t5, "t5."), folder / "t5")
    tokenizers.save_t5(folder / "t5")

    pieces = len(tokenizers.clip_vocabulary())
    end, start = pieces - 1, pieces - 2
    special = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    clip = CLIPTextModel(CLIPTextConfig(**CLIP, **special, vocab_size=pieces))
    _save_transformer(_fill(clip, "clip."), folder / "clip")
    tokenizers.save_clip(folder / "clip")


def _save_transformer(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    tensors = model.state_dict()
    tensors.pop("encoder.embed_tokens.weight", None)  # T5's second name for `shared.weight`
    # By hand, for the model's own save_pretrained draws a progress bar.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_identity(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from pipeline.models.eva_clip import EvaClip
    from pipeline.models.pulid import IDFormer, PulidCrossAttention
    from pipeline.models.sizes import MINIATURE

    tower = {}
    for name, tensor in EvaClip(**MINIATURE.eva_clip).trunk.state_dict().items():
        for timm, original in ORIGINAL_NAMES:
            name = name.replace(timm, original)
        tower["visual." + name] = weight("visual." + name, tensor.shape)
    (folder / EVA_CLIP).parent.mkdir()
    torch.save({name: torch.from_numpy(values).half() for name, values in tower.items()}, folder / EVA_CLIP)

    modules: dict[str, nn.Module] = {"pulid_encoder": IDFormer(**MINIATURE.idformer)}
    for index in range(CROSS_ATTENTIONS):
        modules[f"pulid_ca.{index}"] = PulidCrossAttention(**MINIATURE.cross_attention)
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = torch.from_numpy(weight(f"{prefix}.{name}", tensor.shape))
    (folder / PULID).parent.mkdir()
    save_file(tensors, folder / PULID)


def _fill(model: Any, prefix: str) -> Any:
    import torch

    state = {name: torch.from_numpy(weight(prefix + name, tensor.shape)) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The weight called `name`, float32: matrices keep the size of what goes through them, norms are near one.

    The stream is numpy's PCG64, seeded with the CRC-32 of the name.
    """
    stream = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = stream.standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) > 1:
        fan_in = shape[0] if name.endswith("proj_out") else int(np.prod(shape[1:]))  # a bare matrix: rows go in
        return values / np.float32(np.sqrt(fan_in))
    return values * np.float32(0.1) + np.float32(1.0 if name.endswith(".weight") else 0.0)

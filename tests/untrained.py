"""A complete miniature that nobody has trained: the real sizes and file formats, random weights, face networks by rule.

Its faces are red squares (face_models.py), its pictures noise. It loads in the place of the trained one through
`Settings.miniature_dir`, so that laws about files and formats need no training.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.miniature import configs, files, tokenizers
from pipeline.miniature.scenes import WORDS
from pipeline.models.eva_clip import EvaClip
from pipeline.models.pulid import IDFormer, PulidCrossAttention
from pipeline.models.sizes import MINIATURE
from tests.face_models import bisenet_weights, write_arcface, write_scrfd

CROSS_ATTENTIONS = 8  # after each of 4 double blocks and every second of 8 single blocks


def write(folder: Path, seed: int = 0) -> Path:
    """Write every file of the miniature and their manifest; returns the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _write_flux(folder)
        _write_text_encoders(folder)
        _write_faces(folder)
        _write_identity(folder)
    files.write_manifest(folder)
    return folder


def _write_flux(folder: Path) -> None:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    flux = FluxTransformer2DModel(**configs.FLUX)
    nn.Module.to(flux, torch.bfloat16)  # diffusers' own warns where nothing is to be warned of
    flux.save_pretrained(files.place(folder, "flux"))
    AutoencoderKL(**configs.VAE).save_pretrained(files.place(folder, "vae"))


def _write_text_encoders(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel

    t5, clip = files.place(folder, "t5"), files.place(folder, "clip")
    pieces = tokenizers.save_t5(t5, WORDS)
    files.save_transformer(T5EncoderModel(T5Config(**configs.t5(pieces))), t5)
    pieces = tokenizers.save_clip(clip, WORDS)
    files.save_transformer(CLIPModel(CLIPConfig(**configs.clip(pieces))), clip)


def _write_faces(folder: Path) -> None:
    write_scrfd(files.place(folder, "detector"))
    for role in ("recogniser", "judge"):
        write_arcface(files.place(folder, role))
    parser = bisenet_weights(label=1, width=MINIATURE.bisenet_width)
    save_file({name: weight.contiguous().clone() for name, weight in parser.items()}, files.place(folder, "parsing"))


def _write_identity(folder: Path) -> None:
    tower = EvaClip(**MINIATURE.eva_clip).trunk.state_dict()
    _save_half({f"visual.trunk.{name}": weight for name, weight in tower.items()}, files.place(folder, "eva_clip"))
    modules: dict[str, nn.Module] = {"pulid_encoder": IDFormer(**MINIATURE.idformer)}
    for index in range(CROSS_ATTENTIONS):
        modules[f"pulid_ca.{index}"] = PulidCrossAttention(**MINIATURE.cross_attention)
    tensors = {f"{prefix}.{name}": w for prefix, module in modules.items() for name, w in module.state_dict().items()}
    _save_half(tensors, files.place(folder, "pulid"))


def _save_half(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)

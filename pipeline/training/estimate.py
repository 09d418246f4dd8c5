"""What a training of flux-dev takes: parameters, memory and time, from the real networks' configurations.

The networks are built on torch's meta device, where they have shapes but no numbers. Memory is counted; time is the
number of multiplications over the card's speed, at a utilisation that trainings of this kind reach.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.models.sizes import OFFICIAL
from pipeline.training.config import TrainingConfig
from pipeline.training.networks import new_pulid

GIB = 2**30
CROSS_ATTENTIONS = 20
T5_TOKENS = 128
BLOCKS = 19 + 38  # double and single
WIDTH, HEADS = 3072, 24
BLOCK_TENSORS = 40  # of the width of a token, that a block's backward pass holds
DECODING = 12_000.0  # bytes per pixel that the VAE's decoder keeps in bfloat16


@dataclass(frozen=True, slots=True)
class Estimate:
    """Parameters by network; bytes of one GPU by what takes them; seconds of one step."""

    parameters: dict[str, int]
    memory: dict[str, float]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{name:<34}{count / 1e6:>10,.1f} M parameters" for name, count in self.parameters.items()]
        lines += [f"{name:<34}{size / GIB:>10.1f} GiB" for name, size in self.memory.items()]
        lines.append(f"{'together':<34}{sum(self.memory.values()) / GIB:>10.1f} GiB")
        lines.append(f"{'one step':<34}{self.seconds:>10.1f} s")
        return "\n".join(lines)


def networks() -> dict[str, nn.Module]:
    """The official networks on the meta device."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    from pipeline.models.eva_clip import EvaClip

    with torch.device("meta"):
        idformer, modules = new_pulid(CROSS_ATTENTIONS, OFFICIAL.idformer, OFFICIAL.cross_attention)
        return {
            "FLUX.1 [dev], frozen": FluxTransformer2DModel(guidance_embeds=True),
            "VAE, frozen": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "EVA-CLIP, frozen": EvaClip(),
            "IDFormer, trained": idformer,
            "cross-attentions, trained": nn.ModuleList(modules),
        }


def estimate(config: TrainingConfig, size: int, workers: int, flops: float = 4e14) -> Estimate:
    """For pictures of `size` pixels on `workers` GPUs, with gradient checkpointing.

    flops: what one GPU reaches in bfloat16 (of an H100's 9.9e14 about 4e14).
    """
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in networks().items()}
    trained = sum(count for name, count in counts.items() if name.endswith("trained"))
    frozen = sum(counts.values()) - trained
    tokens = (size // 16) ** 2 + T5_TOKENS
    batch, id_batch, align_batch = (
        max(1, n // workers) for n in (config.batch_size, config.id_batch_size, config.align_batch_size)
    )
    kept = {"flow": batch * _pass_bytes(tokens)}  # the terms run one after the other, so the largest one counts
    if config.stage > 1:
        kept["identity"] = id_batch * (_id_steps(config) * _pass_bytes(tokens) + DECODING * size**2)
    if config.stage > 2:
        kept["alignment"] = align_batch * (_pass_bytes(tokens) + _feature_bytes(tokens))
    largest = max(kept, key=kept.__getitem__)
    memory = {
        "frozen networks, bfloat16": 2.0 * frozen,
        "trained weights and their mean": 8.0 * trained,
        "gradients": 4.0 * trained,
        "AdamW": 8.0 * trained,
        f"activations of the {largest} term": kept[largest],
        "inside of one block": 2.0 * batch * tokens * WIDTH * BLOCK_TENSORS,
    }
    passes = _passes(config, batch, id_batch, align_batch)
    return Estimate(counts, memory, passes * _pass_flops(counts["FLUX.1 [dev], frozen"], tokens) / flops)


def _pass_bytes(tokens: int) -> float:
    """What one pass of one sample keeps with gradient checkpointing: every block's input in bfloat16."""
    return 2.0 * tokens * WIDTH * BLOCKS


def _feature_bytes(tokens: int) -> float:
    """What the alignment of one sample keeps: in all layers queries of both paths in bfloat16, and in float32 the path
    with identity, its difference to the other, and the words' weights before and after the softmax.
    """
    image = tokens - T5_TOKENS
    return BLOCKS * (2 * 2.0 * image * WIDTH + 2 * 4.0 * image * WIDTH + 2 * 4.0 * HEADS * T5_TOKENS * image)


def _id_steps(config: TrainingConfig) -> int:
    return min(config.id_steps, config.id_gradient_steps) if config.id_form == "sampled" else 1


def _passes(config: TrainingConfig, batch: int, id_batch: int, align_batch: int) -> float:
    """Forward passes of one sample that a step costs on one GPU, backward ones counted in.

    A pass with gradient costs three: forward, forward once more as it was not kept, and backward into activations only.
    """
    passes = 3.0 * batch
    if config.stage > 1:
        steps = config.id_steps if config.id_form == "sampled" else 1
        passes += id_batch * (steps + 2 * _id_steps(config)) / config.id_every
    if config.stage > 2:
        walked = config.align_steps - 1 if config.align_form == "trajectory" else 0  # half of it, for two paths
        passes += align_batch * (walked + 4) / config.align_every
    return passes


def _pass_flops(parameters: int, tokens: int) -> float:
    """One forward pass of one sample: two per parameter and token, and what the tokens ask of each other."""
    # A token goes through one half of a double block's weights only; modulation, 3.3 billion of all, is per sample.
    through = parameters - 3.3e9 - 19 * 12 * WIDTH**2
    return 2.0 * through * tokens + 4.0 * tokens**2 * WIDTH * BLOCKS

"""The miniature's sizes as the configurations of diffusers and transformers; those of PuLID's own are in models/sizes.

Pictures of 256 x 256 are 16 x 16 latents and 64 image tokens: the VAE has one level more than FLUX.1's, so that an
image token is 32 x 32 pixels and a picture takes a second on a laptop.
"""

from collections.abc import Mapping
from typing import Any

PICTURE_SIZE = 256  # pixels: what the miniature was trained on
TEXT_LENGTH = 32  # tokens that its T5 reads

FLUX: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 3,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 24, 24),
}
VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "block_out_channels": (8, 16, 32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 1,  # several would each lose their mean, and with it a picture's colours
    "latent_channels": 16,
    "sample_size": PICTURE_SIZE,
    "scaling_factor": 0.3611,  # FLUX.1's own, as the shift; training puts in those of its latents
    "shift_factor": 0.1159,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5: Mapping[str, Any] = {
    "d_model": 96,
    "d_kv": 32,
    "d_ff": 192,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}
CLIP_TEXT: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 64,
}
CLIP_VISION: Mapping[str, Any] = {
    "image_size": 128,
    "patch_size": 16,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "projection_dim": 64,
}


def t5(vocabulary: int) -> dict[str, Any]:
    """T5Config's arguments for a tokenizer of this many pieces."""
    return {**T5, "vocab_size": vocabulary}


def clip(vocabulary: int) -> dict[str, Any]:
    """CLIPConfig's arguments for a tokenizer of this many pieces, whose last two are the start and the end."""
    end, start = vocabulary - 1, vocabulary - 2
    special = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = {**CLIP_TEXT, **special, "vocab_size": vocabulary}
    return {"text_config": text, "vision_config": dict(CLIP_VISION), "projection_dim": CLIP_TEXT["projection_dim"]}

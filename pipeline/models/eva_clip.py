"""EVA02-CLIP-L-14-336's picture tower with five of its hidden states; `face_features` is what PuLID feeds it.

The tower is timm's own `Eva`, which open_clip uses for the same model; the original checkpoint
(EVA02_CLIP_L_336_psz14_s6B.pt, MIT) is read through timm's converter.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor, nn

from pipeline.models.face_features import face_features
from pipeline.models.sizes import IMAGE_SIZE, PATCH_SIZE

__all__ = ["EvaClip", "face_features"]
FIRST_SIZE = 224  # of the pictures that the tower was first trained on: positions are interpolated


class EvaClip(nn.Module):
    """The picture tower: a normalised face picture -> one pooled vector and five hidden states."""

    def __init__(
        self,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        output_dim: int = 768,
        taps: Sequence[int] = (4, 8, 12, 16, 20),
        patch_size: int = PATCH_SIZE,
    ) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.trunk = Eva(
            img_size=IMAGE_SIZE,
            patch_size=patch_size,
            num_classes=output_dim,
            global_pool="token",
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=4 * 2 / 3,
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(FIRST_SIZE // patch_size,) * 2,
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], **sizes: int | Sequence[int]) -> Self:
        """Build the tower from weights under the original names or open_clip's.

        Keys: `blocks.0.attn.q_proj.weight`..., with or without the prefix `visual.`, or open_clip's `visual.trunk.`;
        keys of the text tower and rotary tables are ignored. Weights become float32. Raises RuntimeError where a
        weight is missing or unknown.
        """
        with torch.device("meta"):  # drawing random numbers that are thrown away takes ten seconds at full size
            tower = cls(**sizes)  # type: ignore[arg-type]
        # The rotary table is computed, not loaded: take the one of a tower without blocks.
        tower.trunk.rope = cls(**{**sizes, "depth": 0}).trunk.rope  # type: ignore[arg-type]
        visual = {k: v.float() for k, v in state_dict.items() if not k.startswith(("text.", "logit_scale"))}
        tower.trunk.load_state_dict(checkpoint_filter_fn(visual, tower.trunk), strict=True, assign=True)
        return tower.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised pictures (B, 3, 336, 336) -> pooled (B, output_dim), not normalised, and the hidden states.

        Hidden state i is the residual stream that enters block taps[i], without a norm, class token first:
        (B, 577, width), or with another patch size as many tokens as Sizes.face_tokens says.
        """
        outputs = [tap - 1 for tap in self.taps]  # what enters a block is what left the one before
        final, states = self.trunk.forward_intermediates(
            images, indices=outputs, return_prefix_tokens=True, output_fmt="NLC"
        )
        hidden = [torch.cat((prefix, patches), dim=1) for patches, prefix in states]  # (B, 1 + 576, width)
        return self.trunk.forward_head(final), hidden

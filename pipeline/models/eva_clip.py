"""EVA02-CLIP-L-14-336's picture tower with five of its hidden states, and the preprocessing that PuLID feeds it.

The tower is timm's own `Eva`, which open_clip uses for the same model; the original checkpoint
(EVA02_CLIP_L_336_psz14_s6B.pt, MIT) is read through timm's converter.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

IMAGE_SIZE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
# BiSeNet's labels that are not the face: background, ears, earring, neck, necklace, cloth, hat (pulid.md 2.4, from
# the official pipeline_flux.py)
BACKGROUND_LABELS = (0, 7, 8, 9, 14, 15, 16, 18)
LUMA = (0.299, 0.587, 0.114)


class EvaClip(nn.Module):
    """The picture tower: a normalised face picture -> one pooled vector and five hidden states."""

    def __init__(
        self,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        output_dim: int = 768,
        taps: Sequence[int] = (4, 8, 12, 16, 20),
    ) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.trunk = Eva(
            img_size=IMAGE_SIZE,
            patch_size=14,
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
            ref_feat_shape=(16, 16),  # the grid it was first trained on, 224 / 14: positions are interpolated
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
        (B, 577, width).
        """
        outputs = [tap - 1 for tap in self.taps]  # what enters a block is what left the one before
        final, states = self.trunk.forward_intermediates(
            images, indices=outputs, return_prefix_tokens=True, output_fmt="NLC"
        )
        hidden = [torch.cat((prefix, patches), dim=1) for patches, prefix in states]  # (B, 1 + 576, width)
        return self.trunk.forward_head(final), hidden


def gray_on_white(aligned_rgb: ArrayLike, labels: ArrayLike) -> Tensor:
    """The aligned face in gray, all that is not face white, at the tower's size: (336, 336) float32.

    aligned_rgb (H, W, 3) uint8, labels (H, W) in BiSeNet's numbering. Values are near 0..1 but, as in the official
    code, not clamped after the bicubic resize (antialias=True, torchvision's default since 0.17).
    """
    rgb = torch.from_numpy(np.array(aligned_rgb, dtype=np.uint8)).permute(2, 0, 1).float() / 255  # (3, H, W)
    background = torch.isin(torch.from_numpy(np.array(labels, dtype=np.int64)), torch.tensor(BACKGROUND_LABELS))
    gray = (rgb * torch.tensor(LUMA)[:, None, None]).sum(dim=0)  # (H, W)
    whitened = torch.where(background, torch.ones(()), gray)
    return resize(whitened[None], [IMAGE_SIZE, IMAGE_SIZE], InterpolationMode.BICUBIC, antialias=True)[0]  # type: ignore[no-any-return]


def normalise(features: Tensor) -> Tensor:
    """Gray faces (B, 336, 336) -> the tower's input (B, 3, 336, 336)."""
    mean, std = (torch.tensor(x, device=features.device)[None, :, None, None] for x in (MEAN, STD))
    return (features[:, None].expand(-1, 3, -1, -1) - mean) / std


def face_features(aligned_rgb: NDArray[np.uint8], labels: NDArray[np.integer]) -> Tensor:
    """An aligned face and its parsing -> the tower's normalised input (1, 3, 336, 336).

    aligned_rgb (H, W, 3) uint8, labels (H, W) in BiSeNet's numbering. Source: official pipeline_flux.py,
    get_id_embedding.
    """
    return normalise(gray_on_white(aligned_rgb, labels)[None])

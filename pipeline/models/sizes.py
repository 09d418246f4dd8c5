"""The sizes of the identity networks: the official ones, and those of the miniature."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGE_SIZE = 336  # pixels of the face picture that the tower reads
PATCH_SIZE = 14


@dataclass(frozen=True, slots=True)
class Sizes:
    """Keyword arguments of EvaClip, IDFormer and PulidCrossAttention; what is not named has the official size.

    double_interval and single_interval: a cross-attention follows every so many blocks of FLUX. bisenet_width: the
    channels of the face parser's first level.
    """

    eva_clip: Mapping[str, Any] = field(default_factory=dict)
    idformer: Mapping[str, Any] = field(default_factory=dict)
    cross_attention: Mapping[str, Any] = field(default_factory=dict)
    double_interval: int = 2
    single_interval: int = 4
    bisenet_width: int = 64

    @property
    def face_tokens(self) -> int:
        """The tower's tokens for one face: its patches and the class token."""
        patches: int = IMAGE_SIZE // self.eva_clip.get("patch_size", PATCH_SIZE)
        return patches**2 + 1


OFFICIAL = Sizes()
MINIATURE = Sizes(
    eva_clip={"width": 96, "depth": 6, "heads": 3, "output_dim": 64, "taps": (1, 2, 3, 4, 5), "patch_size": 28},
    idformer={
        "dim": 96,
        "depth": 5,
        "dim_head": 32,
        "heads": 3,
        "output_dim": 96,
        "id_dim": 512 + 64,
        "hidden_dim": 96,
    },
    cross_attention={"dim": 192, "dim_head": 32, "heads": 12, "kv_dim": 96},
    double_interval=1,
    single_interval=2,
    bisenet_width=16,
)

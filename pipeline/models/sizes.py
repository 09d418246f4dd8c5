"""The sizes of the identity networks: the official ones, and those of the miniature."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    """Keyword arguments of EvaClip, IDFormer and PulidCrossAttention; what is not named has the official size."""

    eva_clip: Mapping[str, Any] = field(default_factory=dict)
    idformer: Mapping[str, Any] = field(default_factory=dict)
    cross_attention: Mapping[str, Any] = field(default_factory=dict)


OFFICIAL = Sizes()
MINIATURE = Sizes(
    eva_clip={"width": 64, "depth": 6, "heads": 2, "output_dim": 32, "taps": (1, 2, 3, 4, 5)},
    idformer={
        "dim": 64,
        "depth": 5,
        "dim_head": 32,
        "heads": 2,
        "output_dim": 64,
        "id_dim": 512 + 32,
        "hidden_dim": 64,
    },
    cross_attention={"dim": 64, "dim_head": 32, "heads": 2, "kv_dim": 64},
)

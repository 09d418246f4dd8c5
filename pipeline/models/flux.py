"""IdentityFlux: diffusers' FluxTransformer2DModel with people added to its image tokens.

The transformer that is handed in stays as it is. IdentityFlux looks at the same weights through a second model object
whose blocks are wrapped: each wrapper runs the block and then adds every active person's cross-attention to the image
tokens (official flux/model.py: after double blocks 0, 2, 4..., after single blocks 0, 4, 8...). People are an argument
of each call, so nothing is kept between requests. A wrapper, not a forward hook: with a step cache a hook fires on
skipped blocks too, while what is inside the block's own forward is part of what the cache keeps.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from pipeline.models.pulid import PulidCrossAttention


@dataclass(frozen=True, slots=True, eq=False)
class IdentityRows:
    """One person in each row of a batch.

    tokens (B or 1, T, kv_dim); weight (B or 1, 1, 1) float32: 0 where the person is not active; mask (B or 1, N, 1)
    float32 over the image tokens in 0..1, or None for everywhere. Tensors, never Python numbers: a compiled model
    keeps its graph.
    """

    tokens: Tensor
    weight: Tensor
    mask: Tensor | None = None


class IdentityBlock(nn.Module):
    """One block of FLUX and, where the identity acts, the cross-attention after it."""

    def __init__(self, block: nn.Module, cross_attention: PulidCrossAttention | None) -> None:
        super().__init__()
        self.block = block
        self.cross_attention = cross_attention

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block's own signature and result: (text tokens, image tokens)."""
        others = dict(joint_attention_kwargs or {})
        people: Sequence[IdentityRows] = others.pop("people", ())
        text, image = self.block(hidden_states, encoder_hidden_states, temb, image_rotary_emb, others)
        return text, image if self.cross_attention is None else self._with_people(image, people)

    def _with_people(self, image: Tensor, people: Sequence[IdentityRows]) -> Tensor:
        # In parallel: every person reads the block's own output, not what the person before has added.
        added = image
        for person in people:
            strength = person.weight if person.mask is None else person.weight * person.mask
            residual = strength * self.cross_attention(person.tokens, image)  # type: ignore[misc]
            added = added + residual.to(image.dtype)
        return added


class IdentityFlux(nn.Module):
    """FLUX with identities: predicts one step for rows that each have their own time, guidance, text and people.

    A cross-attention follows every `double_interval`th double block and every `single_interval`th single block, from
    the first on.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        cross_attentions: Sequence[PulidCrossAttention],
        double_interval: int = 2,
        single_interval: int = 4,
    ) -> None:
        super().__init__()
        doubles, singles = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        wanted = math.ceil(doubles / double_interval) + math.ceil(singles / single_interval)
        if len(cross_attentions) != wanted:
            raise ValueError(f"{doubles} double and {singles} single blocks take {wanted} cross-attentions")
        remaining = iter(cross_attentions)
        view = copy.copy(transformer)
        # The copy's own register of submodules: replacing blocks in it leaves the original's alone.
        view._modules = dict(transformer._modules)
        view.transformer_blocks = _wrap(transformer.transformer_blocks, double_interval, remaining)
        view.single_transformer_blocks = _wrap(transformer.single_transformer_blocks, single_interval, remaining)
        self.transformer = view

    def forward(  # noqa: PLR0913 - the inputs of one step, each under its own name
        self,
        latents: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        text: Tensor,
        pooled: Tensor,
        ids: Tensor,
        people: Sequence[IdentityRows] = (),
    ) -> Tensor:
        """The velocity of each row (B, N, 64).

        latents (B, N, 64) packed; timestep (B,) in 0..1; guidance (B,), None for a model without guidance embedding;
        text (B, L, 4096); pooled (B, 768); ids (N, 3) positions of the image tokens, one resolution for all rows.
        """
        text_ids = torch.zeros(text.shape[1], 3, device=latents.device, dtype=ids.dtype)  # (L, 3)
        return self.transformer(  # type: ignore[no-any-return]
            hidden_states=latents,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timestep,
            img_ids=ids,
            txt_ids=text_ids,
            guidance=guidance,
            joint_attention_kwargs={"people": people},
            return_dict=False,
        )[0]

    predict = forward

    def enable_cache(self, config: Any) -> None:
        """Switch on one of diffusers' step caches (FirstBlockCacheConfig, say); all rows of a call share its state."""
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        # The caches look up by its class where a block's outputs are.
        places = TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
        TransformerBlockRegistry.register(IdentityBlock, places)
        self.transformer.enable_cache(config)


def _wrap(blocks: nn.ModuleList, interval: int, cross_attentions: Any) -> nn.ModuleList:
    return nn.ModuleList(
        IdentityBlock(block, next(cross_attentions) if index % interval == 0 else None)
        for index, block in enumerate(blocks)
    )

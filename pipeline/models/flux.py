"""IdentityFlux: diffusers' FluxTransformer2DModel with people added to its image tokens.

The transformer that is handed in stays as it is. IdentityFlux looks at the same weights through a second model object
whose blocks are wrapped: each wrapper runs the block and then adds every active person's cross-attention to the image
tokens (official flux/model.py: after double blocks 0, 2, 4..., after single blocks 0, 4, 8...). People are an argument
of each call, so nothing is kept between requests.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from pipeline.models.folding import Attend, PreparedIdentity, prepare
from pipeline.models.modulation import Modulation, read_table, view_of
from pipeline.models.pulid import PulidCrossAttention
from pipeline.models.step_cache import StepCache


@dataclass(frozen=True, slots=True, eq=False)
class IdentityRows:
    """One person in each row of a batch, by tokens: for training, where the cross-attentions change.

    tokens (B or 1, T, kv_dim); weight (B or 1, 1, 1) float32: 0 where the person is not active; mask (B or 1, N, 1)
    float32 over the image tokens in 0..1, or None for everywhere.
    """

    tokens: Tensor
    weight: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class IdentityRow:
    """One person in one row of a batch, prepared: for serving.

    weight (1, 1, 1) float32, and mask (1, N, 1) float32 over the image tokens in 0..1, or None for everywhere: tensors,
    never Python numbers, so that a compiled model keeps its graph.
    """

    row: int
    identity: PreparedIdentity
    weight: Tensor
    mask: Tensor | None = None


People = Sequence[IdentityRows] | Sequence[IdentityRow]


class IdentityBlock(nn.Module):
    """One block of FLUX and, where the identity acts, the cross-attention after it."""

    def __init__(self, block: nn.Module, cross_attention: PulidCrossAttention | None, index: int, place: str) -> None:
        """`index` among the cross-attentions; `place` in the model: first, between or last."""
        super().__init__()
        self.block = block
        self.cross_attention = cross_attention
        self.index = index
        self.place = place
        self.attend: Attend | None = None  # folded_attention, where it is compiled

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
        people: People = others.pop("people", ())
        cache: StepCache | None = others.pop("step_cache", None)
        if cache is not None and cache.skipping and self.place != "first":
            return encoder_hidden_states, hidden_states
        text, image = self.block(hidden_states, encoder_hidden_states, temb, image_rotary_emb, others)
        if self.cross_attention is not None:
            image = self._with_people(image, people)
        if cache is not None and self.place == "first":
            return cache.after_first(hidden_states, text, image)
        if cache is not None and self.place == "last":
            cache.after_last(text, image)
        return text, image

    def _with_people(self, image: Tensor, people: People) -> Tensor:
        # In parallel: every person reads the block's own output, not what the person before has added.
        if people and isinstance(people[0], IdentityRow):
            return self._with_rows(image, cast(Sequence[IdentityRow], people))
        added = image
        for person in cast(Sequence[IdentityRows], people):
            residual = _strength(person) * self.cross_attention(person.tokens, image)  # type: ignore[misc]
            added = added + residual.to(image.dtype)
        return added

    def _with_rows(self, image: Tensor, people: Sequence[IdentityRow]) -> Tensor:
        # Row by row: a row costs what its own people cost, and rounds as if it were alone.
        rows = [image] if image.shape[0] == 1 else list(image.chunk(image.shape[0]))
        for person in people:
            layer = person.identity.layers[self.index]
            residual = _strength(person) * layer(image[person.row : person.row + 1], self.attend)
            rows[person.row] = rows[person.row] + residual.to(image.dtype)
        return rows[0] if len(rows) == 1 else torch.cat(rows)


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
        modulation: str = "live",
    ) -> None:
        """`modulation`: live (in each step), table (once per picture), host (the same, its weights in host memory)."""
        super().__init__()
        doubles, singles = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        wanted = math.ceil(doubles / double_interval) + math.ceil(singles / single_interval)
        if len(cross_attentions) != wanted:
            raise ValueError(f"{doubles} double and {singles} single blocks take {wanted} cross-attentions")
        self._cross_attentions = tuple(cross_attentions)
        # not a submodule: its weights may live on another device
        self._modulation = [] if modulation == "live" else [Modulation(transformer, host=modulation == "host")]
        plain = transformer if modulation == "live" else read_table(transformer)
        places = iter(("first", *("between",) * (doubles + singles - 2), "last"))
        remaining = iter(enumerate(cross_attentions))
        self.transformer = view_of(
            transformer if modulation == "live" else plain,
            transformer_blocks=_wrap(plain.transformer_blocks, double_interval, remaining, places),
            single_transformer_blocks=_wrap(plain.single_transformer_blocks, single_interval, remaining, places),
        )

    def forward(  # noqa: PLR0913 - the inputs of one step, each under its own name
        self,
        latents: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        text: Tensor,
        pooled: Tensor,
        ids: Tensor,
        people: People = (),
        step_cache: StepCache | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor:
        """The velocity of each row (B, N, 64).

        latents (B, N, 64) packed; timestep (B,) in 0..1; guidance (B,), None for a model without guidance embedding;
        text (B, L, 4096); pooled (B, 768), or this step's rows of `conditioning`; ids (N, 3) positions of the image
        tokens, one resolution for all rows; `step_cache` is that of the only row; text_ids (L, 3), null for zeros.
        """
        if text_ids is None:
            text_ids = ids.new_zeros(text.shape[1], 3)  # (L, 3)
        return self.transformer(  # type: ignore[no-any-return]
            hidden_states=latents,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timestep,
            img_ids=ids,
            txt_ids=text_ids,
            guidance=guidance,
            joint_attention_kwargs={"people": people, "step_cache": step_cache},
            return_dict=False,
        )[0]

    predict = forward

    def check(self) -> None:
        """Raises where no pass can succeed any more: never, but among several GPUs (pipeline/context_parallel.py)."""

    def prepare(self, tokens: Tensor) -> PreparedIdentity:
        """An identity (1, T, kv_dim) for every step to come; see pipeline/models/folding.py."""
        return prepare(self._cross_attentions, tokens)

    def conditioning(self, times: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """What `forward` takes as `pooled` in each step (S, 768 or the table's width).

        times (S,) in 0..1; guidance (1,) or None; pooled (1, 768) or (S, 768).
        """
        if not self._modulation:
            return pooled.expand(times.shape[0], -1)
        return self._modulation[0].table(times, guidance, pooled)


def _strength(person: IdentityRows | IdentityRow) -> Tensor:
    return person.weight if person.mask is None else person.weight * person.mask


def _wrap(
    blocks: nn.ModuleList, interval: int, remaining: Iterator[tuple[int, PulidCrossAttention]], places: Iterator[str]
) -> nn.ModuleList:
    wrapped = []
    for number, block in enumerate(blocks):
        index, cross_attention = next(remaining) if number % interval == 0 else (-1, None)
        wrapped.append(IdentityBlock(block, cross_attention, index, next(places)))
    return nn.ModuleList(wrapped)

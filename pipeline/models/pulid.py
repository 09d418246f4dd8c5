"""PuLID's own networks for FLUX: IDFormer and PulidCrossAttention.

State-dict keys, sizes and numerics are those of the official `pulid/encoders_transformer.py`, so that
`pulid_flux_v0.9.1.safetensors` (Apache-2.0) loads strictly under the prefixes `pulid_encoder.` and `pulid_ca.{i}.`.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """The weights of one attention from tokens of width `dim` to others of width `kv_dim`, under the official keys."""

    def __init__(self, dim: int, dim_head: int, heads: int, kv_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(kv_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(kv_dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)


class PulidCrossAttention(Attention):
    """One cross-attention from FLUX's image tokens to identity tokens (official name: PerceiverAttentionCA)."""

    def __init__(self, dim: int = 3072, dim_head: int = 128, heads: int = 16, kv_dim: int = 2048) -> None:
        super().__init__(dim, dim_head, heads, kv_dim)

    def forward(self, id_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Identity tokens (B or 1, T, kv_dim) and image tokens (B, N, dim) -> what to add to the image (B, N, dim)."""
        query = self.to_q(self.norm2(image_tokens))  # (B, N, heads * dim_head)
        key, value = self.to_kv(self.norm1(id_tokens)).chunk(2, dim=-1)  # (B, T, heads * dim_head) each
        return self.to_out(attention(query, key, value, self.heads))  # type: ignore[no-any-return]


class PerceiverAttention(Attention):
    """Latents attend to a context and to themselves."""

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__(dim, dim_head, heads, kv_dim=dim)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """Context (B, C, dim) and latents (B, L, dim) -> (B, L, dim)."""
        latents = self.norm2(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat((self.norm1(context), latents), dim=1)).chunk(2, dim=-1)  # (B, C + L, ..)
        return self.to_out(attention(query, key, value, self.heads))  # type: ignore[no-any-return]


class IDFormer(nn.Module):
    """The identity encoder: an id vector and five hidden states of EVA-CLIP become identity tokens.

    `depth` layers are spread evenly over the hidden states, coarse to fine.
    """

    SCALES = 5

    def __init__(  # noqa: PLR0913 - the official constructor's own names, plus the two sizes that it holds fixed
        self,
        dim: int = 1024,
        depth: int = 10,
        dim_head: int = 64,
        heads: int = 16,
        num_id_token: int = 5,
        num_queries: int = 32,
        output_dim: int = 2048,
        ff_mult: int = 4,
        id_dim: int = 1280,
        hidden_dim: int = 1024,
    ) -> None:
        super().__init__()
        if depth % self.SCALES:
            raise ValueError(f"depth must be a multiple of {self.SCALES}, one group of layers per hidden state")
        self.num_id_token = num_id_token
        self.num_queries = num_queries
        self.id_dim = id_dim
        self.hidden_dim = hidden_dim
        scale = dim**-0.5
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) * scale)
        self.proj_out = nn.Parameter(torch.randn(dim, output_dim) * scale)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads), _feed_forward(dim, ff_mult)]) for _ in range(depth)
        )
        for index in range(self.SCALES):
            setattr(self, f"mapping_{index}", _mapping(hidden_dim, dim, dim))
        self.id_embedding_mapping = _mapping(id_dim, dim, dim * num_id_token)

    def forward(self, id_cond: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """Encode one photo, or several of one person together.

        id_cond (B, id_dim), or (B, P, id_dim) for P photos; hidden: five tensors (B, S, hidden_dim), for P photos
        (B, P * S, hidden_dim) -> identity tokens (B, num_queries, output_dim).
        """
        batch = id_cond.shape[0]
        photos = id_cond.shape[1] if id_cond.ndim == 3 else 1
        id_tokens = self.id_embedding_mapping(id_cond)
        id_tokens = id_tokens.reshape(batch, self.num_id_token * photos, -1)  # (B, 5 * P, dim)
        latents = torch.cat((self.latents.expand(batch, -1, -1), id_tokens), dim=1)  # (B, num_queries + 5 * P, dim)
        for scale, states in enumerate(hidden):
            context = torch.cat((id_tokens, getattr(self, f"mapping_{scale}")(states)), dim=1)  # (B, 5 * P + S, dim)
            for attend, feed_forward in self._layers(scale):
                latents = attend(context, latents) + latents
                latents = feed_forward(latents) + latents
        return latents[:, : self.num_queries] @ self.proj_out

    def _layers(self, scale: int) -> Iterator[tuple[PerceiverAttention, nn.Sequential]]:
        per_scale = len(self.layers) // self.SCALES
        for layer in self.layers[scale * per_scale : (scale + 1) * per_scale]:
            attend, feed_forward = cast(nn.ModuleList, layer)
            yield cast(PerceiverAttention, attend), cast(nn.Sequential, feed_forward)

    def unconditional(self, tokens: int = 577) -> Tensor:
        """The identity tokens of nobody (1, num_queries, output_dim): all inputs zero, at EVA-CLIP's token count.

        A constant of the weights and of the count: other counts of zeros give other tokens.
        """
        zeros = self.proj_out.new_zeros
        hidden = [zeros(1, tokens, self.hidden_dim)] * self.SCALES
        return self(zeros(1, self.id_dim), hidden)  # type: ignore[no-any-return]


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention with the official numerics: both sides scaled before the product, softmax in float32.

    query (B, N, H * D); key and value (B or 1, T, H * D) -> (B, N, H * D).
    """
    query, key, value = (
        x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value)
    )  # (B, H, ., D)
    scale = query.shape[-1] ** -0.25
    weights = (query * scale) @ (key * scale).transpose(-2, -1)  # (B, H, N, T)
    weights = weights.float().softmax(dim=-1).to(weights.dtype)
    mixed: Tensor = weights @ value  # (B, H, N, D)
    return mixed.transpose(1, 2).flatten(2)


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, dim * mult, bias=False), nn.GELU(), nn.Linear(dim * mult, dim, bias=False)
    )


def _mapping(in_dim: int, dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(in_dim, dim), nn.LayerNorm(dim), nn.LeakyReLU()),
        *(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.LeakyReLU()),
        nn.Linear(dim, out_dim),
    )

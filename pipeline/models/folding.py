"""Identities made ready for FLUX: all of a cross-attention that depends on the identity alone, computed once.

With LayerNorm's gain g and offset b, and per head h with keys K_h and values V_h (T x D), the cross-attention is

    softmax(LN(x) Wq_h K_h' / sqrt(D)) V_h Wo_h'    summed over the heads,

so that `to_logits = (g * Wq_h' K_h' / sqrt(D))'`, `bias = b Wq_h' K_h' / sqrt(D)` and `to_image = V_h Wo_h'` are
constants of the identity. A step is then a norm, a product to 32 logits a head, a softmax and a product back: a quarter
of the work at one photo, and exact up to rounding. The weight of a person stays outside, as one fold serves every
weight.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.pulid import PulidCrossAttention, attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class FoldedAttention:
    """A cross-attention folded with an identity: to_logits (H * T, dim), bias (H * T), to_image (H * T, dim)."""

    to_logits: Tensor
    bias: Tensor
    to_image: Tensor
    heads: int
    eps: float

    def __call__(self, image: Tensor, attend: "Attend | None" = None) -> Tensor:
        """Image tokens (B, N, dim) -> what to add at weight 1 (B, N, dim); `attend`: folded_attention, compiled."""
        attend = attend or folded_attention
        return attend(image, self.to_logits, self.bias, self.to_image, self.heads, self.eps)

    @property
    def nbytes(self) -> int:
        """Bytes that it alone takes."""
        return sum(tensor.nbytes for tensor in (self.to_logits, self.bias, self.to_image))


@dataclass(frozen=True, slots=True, eq=False)
class CachedAttention:
    """A cross-attention with an identity's keys and values (1, T, H * D), where folding would cost more.

    Beside them what a step reads of the cross-attention: norm2's gain and offset (dim), to_q (H * D, dim), to_out
    (dim, H * D). Where the cross-attention lies in host memory they are copies of its own; else they are `shared`.
    """

    key: Tensor
    value: Tensor
    gain: Tensor
    offset: Tensor
    to_q: Tensor
    to_out: Tensor
    heads: int
    eps: float
    shared: bool

    def __call__(self, image: Tensor, _: "Attend | None" = None) -> Tensor:
        """Image tokens (B, N, dim) -> what to add to them at weight 1 (B, N, dim)."""
        normed = functional.layer_norm(image, image.shape[-1:], self.gain, self.offset, self.eps)
        query = functional.linear(normed, self.to_q)  # (B, N, H * D)
        return functional.linear(attention(query, self.key, self.value, self.heads), self.to_out)

    @property
    def nbytes(self) -> int:
        """Bytes that it alone takes."""
        own = (self.key, self.value)
        copies = () if self.shared else (self.gain, self.offset, self.to_q, self.to_out)
        return sum(tensor.nbytes for tensor in (*own, *copies))


@dataclass(frozen=True, slots=True, eq=False)
class PreparedIdentity:
    """An identity for FLUX: one prepared attention for each cross-attention, in order. Biometric data."""

    layers: tuple[FoldedAttention | CachedAttention, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the device: at FLUX.1's sizes 126 MB in bfloat16 for one photo."""
        return sum(layer.nbytes for layer in self.layers)


def folded_attention(
    image: Tensor, to_logits: Tensor, bias: Tensor, to_image: Tensor, heads: int, eps: float
) -> Tensor:
    """Image tokens (B, N, dim) -> what a folded identity adds to them (B, N, dim); softmax in float32."""
    normed = functional.layer_norm(image, image.shape[-1:], eps=eps)  # gain and offset are folded
    logits = torch.unflatten(functional.linear(normed, to_logits, bias), -1, (heads, -1))  # (B, N, H, T)
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(image.dtype)
    return weights.flatten(-2) @ to_image


def prepare(cross_attentions: Iterable[PulidCrossAttention], tokens: Tensor) -> PreparedIdentity:
    """An identity (1, T, kv_dim), ready for every step on the device and in the dtype of its tokens.

    Each cross-attention is folded where that makes a step cheaper, as with up to four concatenated photos at FLUX.1's
    sizes; beyond, its keys and values are kept. The weights may lie on another device, from where they are read, and
    where they stay.
    """
    return PreparedIdentity(
        tuple(
            fold(module, tokens) if folds(module, tokens.shape[1]) else keep(module, tokens)
            for module in cross_attentions
        )
    )


def folds(module: PulidCrossAttention, tokens: int) -> bool:
    """Whether `tokens` identity tokens cost a step fewer multiplications folded than as keys and values.

    Where the cross-attention lies in host memory, that is also where they take fewer bytes: both sides, twice, are the
    elements of the matrices that are read.
    """
    inner, dim = module.to_q.weight.shape
    return dim * module.heads * tokens < inner * (dim + tokens)


def fold(module: PulidCrossAttention, tokens: Tensor) -> FoldedAttention:
    """Multiply an identity's keys and values (tokens (1, T, kv_dim)) into a cross-attention.

    In float32, whatever the dtype of the tokens: only the finished matrices are rounded to it.
    """
    heads, dtype, device = module.heads, tokens.dtype, tokens.device
    key, value = (torch.unflatten(part[0].float(), -1, (heads, -1)) for part in _key_value(module, tokens))  # (T, H, D)
    key = key * key.shape[-1] ** -0.5
    to_q = torch.unflatten(module.to_q.weight.to(device, torch.float32), 0, (heads, -1))  # (H, D, dim)
    to_out = torch.unflatten(module.to_out.weight.to(device, torch.float32), 1, (heads, -1))  # (dim, H, D)
    gain, offset = (part.to(device, torch.float32) for part in (module.norm2.weight, module.norm2.bias))
    logits = torch.einsum("hdm,thd->htm", to_q, key).flatten(0, 1)  # (H * T, dim)
    image = torch.einsum("thd,mhd->htm", value, to_out).flatten(0, 1)  # (H * T, dim)
    return FoldedAttention(
        to_logits=(logits * gain).to(dtype),
        bias=(logits @ offset).to(dtype),
        to_image=image.to(dtype).contiguous(),
        heads=heads,
        eps=module.norm2.eps,
    )


def keep(module: PulidCrossAttention, tokens: Tensor) -> CachedAttention:
    """The keys and values of an identity (tokens (1, T, kv_dim)) for a cross-attention, which stays where it lies."""
    device, weight = tokens.device, module.to_q.weight
    key, value = _key_value(module, tokens)
    return CachedAttention(
        *(key.contiguous(), value.contiguous()),
        *(module.norm2.weight.to(device), module.norm2.bias.to(device)),
        *(weight.to(device), module.to_out.weight.to(device)),
        heads=module.heads,
        eps=module.norm2.eps,
        shared=weight.device == device,
    )


def _key_value(module: PulidCrossAttention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    device = tokens.device
    gain, offset, to_kv = (part.to(device) for part in (module.norm1.weight, module.norm1.bias, module.to_kv.weight))
    normed = functional.layer_norm(tokens, tokens.shape[-1:], gain, offset, module.norm1.eps)  # (1, T, kv_dim)
    key, value = functional.linear(normed, to_kv).chunk(2, dim=-1)  # (1, T, H * D) each
    return key, value

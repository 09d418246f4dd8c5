"""The losses of PuLID (arXiv 2404.16022v2), one value per sample.

Per sample, and never averaged here: a global batch that is cut into workers then has one mean, whoever computed which
part of it. All are computed in float32.

The paper writes all its distances, the diffusion loss among them, as norms. Here every one of them is the mean of the
squares, as the diffusion loss is everywhere. A norm over all elements grows with the root of their number, so that the
published weights would mean another thing at every resolution and width (at FLUX's 4096 tokens of 3072 features the
layout loss would be thousands of times the diffusion loss), and its gradient is as large where the paths nearly agree
as where they do not. Queries and keys are those behind FLUX's RMS norm, of about unit size in every layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

SEMANTIC_WEIGHT, LAYOUT_WEIGHT, ID_WEIGHT = 0.6, 0.1, 1.0  # the paper's section 4.1


def flow_loss(velocity: Tensor, noise: Tensor, latents: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """How far the predicted velocity is from noise - latents (B,): equation 1, for a rectified flow.

    velocity, noise and latents (B, N, C), where the model read (1 - t) latents + t noise. token_weights (B, N), or
    what broadcasts to (B, N, C) where the numbers of a token do not count alike: how much each counts against the
    others of its sample; only their ratios matter.
    """
    squares = (velocity.float() - (noise.float() - latents.float())).square()  # (B, N, C)
    if token_weights is None:
        return squares.mean(dim=(1, 2))
    weights = token_weights if token_weights.dim() == squares.dim() else token_weights[..., None]
    weights = weights.expand_as(squares)
    return (squares * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))


def semantic_alignment(query_id: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """How much the identity changes what each word finds in the picture (B,): equation 3, for one layer.

    Queries (B, H, N, D) of the image tokens with and without identity, key (B, H, L, D) of the text tokens. Every word
    gathers the image queries that answer to it, softmax(K Q^T / sqrt(D)) Q, in either path.
    """
    return (_response(key, query_id) - _response(key, query)).square().mean(dim=(1, 2, 3))


def layout_alignment(query_id: Tensor, query: Tensor) -> Tensor:
    """How much the identity changes the image queries, place by place (B,): equation 4, for one layer.

    Queries (B, H, N, D) of the image tokens with and without identity.
    """
    return (query_id.float() - query.float()).square().mean(dim=(1, 2, 3))


def id_loss(generated: Tensor, reference: Tensor) -> Tensor:
    """One minus the cosine of two face embeddings (B, E), each of any length -> (B,): equation 6."""
    return 1 - cosine_similarity(generated.float(), reference.float(), dim=-1)


def mean_over_layers(values: Sequence[Tensor]) -> Tensor:
    """The mean (B,) of one loss over all layers, each (B,)."""
    return torch.stack(tuple(values)).mean(dim=0)


def _response(key: Tensor, query: Tensor) -> Tensor:
    key, query = key.float(), query.float()
    weights = (key @ query.transpose(-2, -1) * key.shape[-1] ** -0.5).softmax(dim=-1)  # (B, H, L, N)
    response: Tensor = weights @ query  # (B, H, L, D)
    return response

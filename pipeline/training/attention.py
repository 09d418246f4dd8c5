"""Image queries and text keys of every FLUX block in a forward pass: what the alignment losses compare.

They are read behind the query and key norm and before the rotary embedding. Behind the norm, as attention sees them and
of one size in all layers. Before the rotary embedding, which turns each image query by its place: the turn is the same
in both paths, so the layout loss is the same either way; but the semantic loss sums queries of many places, and what a
word finds must not depend on where it is. Text tokens have place zero, where nothing is turned.

Forward hooks on the norms, taken off at the end of the `with`: nothing is patched, nothing stays on the model, any
attention processor serves, and nothing is computed twice. With gradient checkpointing a block runs once more in the
backward pass, when the hooks are gone; the tensors recorded here are part of the graph and are recomputed with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass(slots=True, eq=False)
class AttentionFeatures:
    """One entry per block, in the order of the pass: double blocks, then single ones.

    queries: image tokens (B, H, N, D); keys: text tokens (B, H, L, D).
    """

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


@contextmanager
def attention_features(transformer: nn.Module, text_tokens: int) -> Iterator[AttentionFeatures]:
    """Record what the pass within the `with` attends by; one pass per `with`.

    transformer: FluxTransformer2DModel, or IdentityFlux's view of one. text_tokens: L, as the single blocks read text
    and image as one sequence, text first.
    """
    features = AttentionFeatures()
    handles = []
    for attention in _attentions(transformer):
        joint = attention.added_kv_proj_dim is None  # a single block: one sequence, one norm
        text_norm = attention.norm_k if joint else attention.norm_added_k
        first, last = slice(text_tokens, None), slice(None, text_tokens)
        everything = slice(None)
        queries = partial(_keep, features.queries, first if joint else everything)
        keys = partial(_keep, features.keys, last if joint else everything)
        handles += [attention.norm_q.register_forward_hook(queries), text_norm.register_forward_hook(keys)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _attentions(transformer: nn.Module) -> Iterator[Any]:
    from diffusers.models.transformers.transformer_flux import FluxAttention

    return (module for module in transformer.modules() if isinstance(module, FluxAttention))


def _keep(kept: list[Tensor], tokens: slice, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    kept.append(output[:, tokens].transpose(1, 2))  # (B, tokens, H, D) -> (B, H, tokens, D)

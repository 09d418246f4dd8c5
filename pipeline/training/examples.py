"""What a training reads: examples, and batches of them as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pictures of people with what is known of them; B rows each.

    latents (B, C, h, w): the picture as the VAE's latents, shifted and scaled as FLUX reads them. text (B, L, D) and
    pooled (B, P): its prompt. token_weights (B, N) or (B, N, C): how much each image token, or each number of it,
    counts in the flow loss.

    Of the reference, which is another picture of the same person where there is one: embedding (B, 512), ArcFace's, not
    normalised; either hidden, five of (B, S, H), and eva_pooled (B, E), EVA-CLIP's outputs, or features (B, 336, 336),
    its gray-on-white input, from which they are computed; reference (B, R), the embedding of the ID loss's recogniser.
    """

    latents: Tensor
    text: Tensor
    pooled: Tensor
    embedding: Tensor
    hidden: tuple[Tensor, ...] = ()
    eva_pooled: Tensor | None = None
    features: Tensor | None = None
    token_weights: Tensor | None = None
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def take(self, rows: Sequence[int] | slice) -> "Batch":
        """Some of the rows."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(change(tensor) for tensor in value)
            return None if value is None else change(value)

        return Batch(**{field.name: changed(getattr(self, field.name)) for field in fields(self)})


class Examples(Protocol):
    """Where batches come from."""

    def __len__(self) -> int:
        """How many examples there are."""

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        """These examples, in this order; a pure function of both arguments.

        A seed per example decides whatever is chosen anew each time, such as which other picture of the person is its
        reference.
        """


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """Examples that are one batch of tensors; each has one fixed reference."""

    all: Batch

    def __len__(self) -> int:
        return len(self.all)

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:  # noqa: ARG002
        """These examples."""
        return self.all.take(list(indices))


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Prompts as FLUX reads them: text (P, L, D) and pooled (P, D)."""

    text: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.text)

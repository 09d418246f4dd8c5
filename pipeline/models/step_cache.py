"""First-block cache: where the first block changes little from one step to the next, the others' work is used again.

Source: ParaAttention's first-block cache, as diffusers has it too. Here its state belongs to one row of one picture,
never to the model: nobody's picture depends on a neighbour's, and nothing is left when the picture is done. What the
identity adds lies inside the blocks, and so inside what is kept.
"""

from torch import Tensor


class StepCache:
    """What one row remembers of its last whole step."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: up to which mean change of the first block's residual, relative to its size, a step skips."""
        self._threshold = threshold
        self._residual: Tensor | None = None
        self._head: tuple[Tensor, Tensor] | None = None
        self._tail: tuple[Tensor, Tensor] | None = None
        self.skipping = False

    def forget(self) -> None:
        """Make the next step a whole one, as where an identity begins or ends to act."""
        self._residual = self._head = self._tail = None

    def after_first(self, image_before: Tensor, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Decide on this step; text (1, L, dim) and image (1, N, dim) come out of the first block."""
        residual = image - image_before
        self.skipping = self._tail is not None and self._changed_little(residual)
        if self.skipping and self._tail is not None:
            return text + self._tail[0], image + self._tail[1]
        self._residual, self._head = residual, (text, image)
        return text, image

    def after_last(self, text: Tensor, image: Tensor) -> None:
        """Keep what the blocks after the first have added in a whole step."""
        if self._head is not None:
            self._tail = text - self._head[0], image - self._head[1]
            self._head = None

    def _changed_little(self, residual: Tensor) -> bool:
        if self._residual is None:
            return False
        change = (residual - self._residual).abs().mean() / self._residual.abs().mean()
        return bool(change < self._threshold)

"""Several workers on one global batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class Workers:
    """Who this worker is and how many there are; `total` sums a tensor over all of them, on each of them."""

    rank: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = _alone

    def places(self, batch_size: int) -> range:
        """This worker's places in a global batch, dealt like cards: its first places are shared out evenly too."""
        return range(self.rank, batch_size, self.count)


def distributed() -> Workers:
    """The workers of torch.distributed where it is initialised, else one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Workers()

    def total(tensor: Tensor) -> Tensor:
        summed = tensor.detach().clone()
        torch.distributed.all_reduce(summed)
        return summed

    return Workers(torch.distributed.get_rank(), torch.distributed.get_world_size(), total)

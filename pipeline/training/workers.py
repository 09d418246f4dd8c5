"""Several workers on one global batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


BUCKET = 16 * 2**20  # numbers that are sent together, or one tensor where it is larger


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class Workers:
    """Who this worker is and how many there are; `total` sums a tensor over all of them, on each of them."""

    rank: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = _alone

    def totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Many tensors of one kind, summed over all workers, in few messages: each costs its time however small."""
        if self.count == 1:
            return list(tensors)
        summed: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = self.total(torch.cat([tensor.flatten() for tensor in bucket]))
            parts = flat.split([tensor.numel() for tensor in bucket])
            summed += [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
        return summed

    def places(self, batch_size: int) -> range:
        """This worker's places in a global batch, dealt like cards: its first places are shared out evenly too."""
        return range(self.rank, batch_size, self.count)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def distributed() -> Workers:
    """The workers of torch.distributed where it is initialised, else one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Workers()

    def total(tensor: Tensor) -> Tensor:
        summed = tensor.detach().clone()
        torch.distributed.all_reduce(summed)
        return summed

    return Workers(torch.distributed.get_rank(), torch.distributed.get_world_size(), total)

"""Several workers on one global batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class Workers:
    """Who this worker is and how many there are; `total` sums a tensor over all of them, on each of them.

    bucket: how many numbers a message of `add_up` gathers before it is sent.
    """

    rank: int = 0
    count: int = 1
    total: Callable[[Tensor], Tensor] = _alone
    bucket: int = 2**24

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put sums over all workers into tensors of one dtype and device, in few messages: each costs its time."""
        if self.count == 1:
            return
        for bucket in self._buckets(tensors):
            flat = self.total(torch.cat([tensor.flatten() for tensor in bucket]))
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def _buckets(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor)
            if sum(each.numel() for each in bucket) >= self.bucket:
                yield bucket
                bucket = []
        if bucket:
            yield bucket

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

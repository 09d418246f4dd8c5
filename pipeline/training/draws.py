"""Randomness and order as pure functions of (seed, step, place in the global batch).

No generator has a state that would have to be saved, and none belongs to a worker: whoever computes a sample draws what
anybody else would have drawn for it. So a resumed run goes on as if it had never stopped, and two workers see what one
would have seen.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A seed below 2**63 that depends on every part and on their order."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def order(seed: int, step: int, batch_size: int, examples: int) -> list[int]:
    """The examples of a step's global batch: each of them once per round, in another order in every round."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_round(seed, position // examples, examples)[position % examples]) for position in positions]


@lru_cache(maxsize=2)  # a batch may reach from one round into the next
def _round(seed: int, number: int, examples: int) -> Tensor:
    return torch.randperm(examples, generator=_generator(seed, "order", number))


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one step for some places of its global batch, drawn on the CPU.

    `purpose` names what they are for; equal purposes give equal numbers.
    """

    seed: int
    step: int
    places: Sequence[int]

    def first(self, count: int) -> "Draws":
        """The same for the first `count` of the places."""
        return Draws(self.seed, self.step, self.places[:count])

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        return self._each(purpose, lambda generator: torch.randn(shape, generator=generator))

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform numbers in 0..1 (B, *shape)."""
        return self._each(purpose, lambda generator: torch.rand(shape, generator=generator))

    def choice(self, purpose: str, options: int) -> Tensor:
        """One of 0..options-1 for each place (B,) int64."""
        return self._each(purpose, lambda generator: torch.randint(options, (), generator=generator))

    def one(self, purpose: str, options: int) -> int:
        """One of 0..options-1 for the whole global batch."""
        return int(torch.randint(options, (), generator=_generator(self.seed, self.step, purpose)))

    def seeds(self, purpose: str) -> list[int]:
        """A seed for each place."""
        return [seed_of(self.seed, self.step, place, purpose) for place in self.places]

    def _each(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(_generator(self.seed, self.step, place, purpose)) for place in self.places])


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))

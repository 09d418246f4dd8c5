"""A training loop that can be cut and taken up again: the same for every network of the miniature but PuLID's own."""

import copy
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """How long and how fast: `lr` of AdamW, `muon_lr` of Muon where it is used, both at their highest.

    The rate rises over `warm_up` steps, stays until `flat` (a share) of them, and falls linearly to zero.
    """

    steps: int
    batch: int
    lr: float
    muon_lr: float = 0.0
    warm_up: int = 40
    flat: float = 0.4
    clip: float = 1.0
    ema: float = 0.99
    weight_decay: float = 0.0
    save_every: int = 200
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of its highest."""
        falling = (self.steps - step) / max(self.steps * (1 - self.flat), 1.0)
        return min(1.0, (step + 1) / self.warm_up, falling)


def matrices(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The weights of all linear and convolution layers below these modules: what Muon, made for matrices, takes."""
    kinds = (nn.Linear, nn.Conv2d)
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, kinds))
    return {weight for layer in layers if isinstance(weight := layer.weight, nn.Parameter)}


class Loop(Generic[Module]):
    """Trains a module's parameters step by step; keeps their moving average; saves itself and finds itself again."""

    def __init__(
        self, module: Module, plan: LoopPlan, checkpoint: Path | None = None, muon: Iterable[nn.Parameter] = ()
    ) -> None:
        """`muon`: the parameters that Muon trains; AdamW trains the rest. `checkpoint`: the file to resume from."""
        self.module, self.plan, self.step = module, plan, 0
        self._checkpoint = checkpoint
        chosen = set(muon)
        trainable = [p for p in module.parameters() if p.requires_grad]
        # Muon takes matrices only: a convolution's weight is seen as one, in the same memory
        self._flat = [(p, nn.Parameter(p.data.view(len(p), -1))) for p in trainable if p in chosen]
        others = [p for p in trainable if p not in chosen]
        adamw = torch.optim.AdamW(others, plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay)
        self._optimisers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, plan.lr)]
        if chosen:
            flat = [p for _, p in self._flat]
            fast = torch.optim.Muon(flat, plan.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self._optimisers.append((fast, plan.muon_lr))
        self._average = copy.deepcopy(module).requires_grad_(False)
        if checkpoint is not None and checkpoint.exists():
            self._restore(torch.load(checkpoint, weights_only=True))

    def run(self, loss_at: Callable[[int], Tensor]) -> Module:
        """Take the steps that are left; `loss_at(step)` draws that step's batch. Returns the averaged module.

        A batch must follow from its step alone: then a loop that was cut ends as if it had not been. torch's own
        random numbers do.
        """
        for step in range(self.step, self.plan.steps):
            torch.manual_seed(self.plan.seed * 1_000_003 + step)
            loss = loss_at(step)
            torch.autograd.backward(loss)
            self._update(step)
            self.step = step + 1
            if step % 25 == 0:
                logger.info("%s step %d of %d: loss %.4f", self._name, step, self.plan.steps, loss.item())
            if self._checkpoint is not None and self.step % self.plan.save_every == 0:
                self._save(self._checkpoint)
        return self._average.eval()

    @property
    def _name(self) -> str:
        return type(self.module).__name__ if self._checkpoint is None else self._checkpoint.parent.name

    def _update(self, step: int) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), self.plan.clip)
        for weight, flat in self._flat:
            flat.grad = None if weight.grad is None else weight.grad.reshape(flat.shape)
        for optimiser, highest in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = highest * self.plan.rate(step)
            optimiser.step()
        self.module.zero_grad(set_to_none=True)
        # young averages follow fast, so that the first random weights are soon forgotten
        share = 1 - min(self.plan.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(self._tensors(self._average), self._tensors(self.module), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value, share)
                else:
                    mean.copy_(value)

    @staticmethod
    def _tensors(module: nn.Module) -> Iterator[Tensor]:
        yield from module.parameters()
        yield from module.buffers()

    def _save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "module": self.module.state_dict(),
            "average": self._average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self._optimisers],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.module.load_state_dict(state["module"])
        self._average.load_state_dict(state["average"])
        for (optimiser, _), saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def one_cycle(module: nn.Module, steps: int, rate: float, decay: float, next_loss: Callable[[], Tensor]) -> None:
    """Train a module by AdamW in one cycle of the learning rate (arXiv 1708.07120); leaves it in eval mode.

    For what takes minutes: it is not saved on its way. `decay`: AdamW's weight decay. `next_loss()` draws a batch.
    """
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1, pct_start=0.1)
    started = time.perf_counter()
    for step in range(steps):
        loss = next_loss()
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            logger.info("step %d: loss %.3f after %.0f s", step, loss.item(), time.perf_counter() - started)
    module.eval()


def generator(*numbers: int) -> torch.Generator:
    """A stream of random numbers of its own for these numbers: a seed and a step, say."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(seed)

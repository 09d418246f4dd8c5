"""What moves the weights: AdamW, or Muon for matrices with AdamW for the rest."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InternalError
from pipeline.training.config import TrainingConfig

BETAS = (0.9, 0.99)


class Optimiser:
    """Takes steps at the learning rates of the configuration; the step number alone decides them."""

    def __init__(self, weights: Mapping[str, nn.Parameter], config: TrainingConfig) -> None:
        self._weights, self._config = list(weights.values()), config
        matrices = {name for name, weight in weights.items() if config.optimiser == "muon" and weight.ndim == 2}
        self._parts: list[torch.optim.Optimizer] = []
        rest = _groups({name: weight for name, weight in weights.items() if name not in matrices}, config)
        if rest:
            self._parts.append(torch.optim.AdamW(rest, betas=BETAS, weight_decay=config.weight_decay))
        if matrices:
            groups = _groups({name: weights[name] for name in weights if name in matrices}, config)
            # learning rates then mean the same for both
            muon = torch.optim.Muon(groups, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)

    def zero(self) -> None:
        """Forget the gradients."""
        for weight in self._weights:
            weight.grad = None

    def step(self, number: int) -> Tensor:
        """Clip the gradients and take step `number`; returns their norm before clipping.

        Raises InternalError, and leaves every weight as it was, where a gradient is not finite.
        """
        norm = nn.utils.clip_grad_norm_(self._weights, self._config.clip)
        if not torch.isfinite(norm):
            raise InternalError(f"The gradient of step {number} is not finite; lower the learning rates.")
        factor = self._config.learning_rate(number)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = group["base_lr"] * factor
            part.step()
        return norm

    def state(self) -> list[dict[str, Any]]:
        """Everything that the next step depends on."""
        return [part.state_dict() for part in self._parts]

    def load(self, states: list[dict[str, Any]]) -> None:
        """Go on from a state."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


def _groups(weights: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[dict[str, Any]]:
    rates = {"pulid_ca.": config.lr_cross_attention, "pulid_encoder.": config.lr_idformer}
    groups = []
    for prefix, rate in rates.items():
        members = [weight for name, weight in weights.items() if name.startswith(prefix)]
        if members:
            groups.append({"params": members, "lr": rate, "base_lr": rate})
    return groups

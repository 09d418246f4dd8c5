"""Trainer: batches in, trained weights out; exact to resume, and the same for one worker and for many.

To the bit on one thread of a CPU; elsewhere within the noise of kernels that sum in another order. Not tried on a GPU.
"""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import SettingsInvalid, WeightsCorrupt
from pipeline.training.config import FREE, TrainingConfig
from pipeline.training.draws import Draws, order, seed_of
from pipeline.training.examples import Batch, Examples, Prompts
from pipeline.training.networks import Ema, Networks, save_pulid
from pipeline.training.objective import Objective
from pipeline.training.optimiser import Optimiser
from pipeline.training.workers import Workers, distributed

Figures = Mapping[str, float]


class Trainer:
    """A training: its weights, their running mean, the optimiser, and the number of steps that are done."""

    def __init__(
        self,
        networks: Networks,
        config: TrainingConfig,
        examples: Examples,
        id_prompts: Prompts | None = None,
        contrast: Prompts | None = None,
        workers: Workers | None = None,
    ) -> None:
        """`workers`: those of torch.distributed if not given. Raises SettingsInvalid where the parts do not fit."""
        self.networks, self.config, self.examples = networks, config, examples
        self.workers = distributed() if workers is None else workers
        config.check_workers(self.workers.count)
        networks.prepare(config.gradient_checkpointing)
        self.step = 0
        self._seed = seed_of(config.seed, config.stage)  # the next stage is not to see this one's noise again
        self.weights = networks.trainable()
        self.ema = Ema(self.weights, config.ema)
        self._objective = Objective(networks, config, id_prompts, contrast)
        self._optimiser = Optimiser(self.weights, config)
        self._log = _Log(config.log_dir if self.workers.rank == 0 else None)

    def run(self, until: int | None = None, after_step: Callable[[int, Figures], None] | None = None) -> Figures:
        """Train until `until` steps are done (the configuration's, if not given); returns the last step's figures.

        after_step(steps done, figures) is called after every step: to save, to report, or to raise.
        """
        figures: Figures = {}
        until = self.config.steps if until is None else until
        while self.step < until:
            figures = self.train_step(self.batch())
            self._log.write(self.step, figures)
            if after_step is not None:
                after_step(self.step, figures)
        self._log.close()
        return figures

    def batch(self) -> Batch:
        """This worker's part of the next step's global batch."""
        config = self.config
        chosen = order(self._seed, self.step, config.batch_size, len(self.examples))
        draws = self._draws()
        batch = self.examples.batch([chosen[place] for place in draws.places], draws.seeds("example"))
        return batch.to(self.networks.device)

    def train_step(self, batch: Batch) -> Figures:
        """One step on this worker's part of the global batch; the figures are means over all of it."""
        self._optimiser.zero()
        figures = self._backward(batch)
        for weight in self.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        self.workers.add_up([weight.grad for weight in self.weights.values() if weight.grad is not None])
        norm = self._optimiser.step(self.step)
        self.ema.update(self.weights, self.step)
        self.step += 1
        return {**figures, "gradient": float(norm), "rate": self.config.learning_rate(self.step - 1)}

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Gradients of the objective in the trained weights, summed over this worker's samples."""
        figures: dict[str, float] = {}
        tokens = self._objective.identity_tokens(batch)
        # Every term's backward pass ends at this copy, and IDFormer's own is run once for all of them.
        leaf = tokens.detach().requires_grad_()
        for term in self._objective.terms(batch, leaf, self._draws(), self.workers.count):
            names = list(term.figures)
            sums = [torch.tensor(float(term.count)), *(value.float().cpu() for value in term.figures.values())]
            count, *totals = self.workers.total(torch.stack(sums).to(leaf.device)).tolist()
            (term.loss / max(count, 1.0)).backward()
            figures |= {name: value / max(count, 1.0) for name, value in zip(names, totals, strict=True) if count}
            if "id" in names:
                figures["faces"] = count / self.config.id_batch_size
        assert leaf.grad is not None  # the flow loss always reaches it
        torch.autograd.backward(tokens, leaf.grad)
        return figures

    def _draws(self) -> Draws:
        return Draws(self._seed, self.step, self.workers.places(self.config.batch_size))

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically; every worker holds the same, so one of them writes."""
        self._log.flush()  # whoever goes on from here does not take these steps again
        state = {
            "config": self.config.model_dump_json(),
            "step": self.step,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "ema": self.ema.weights,
            "optimiser": self._optimiser.state(),
        }
        partial = path.with_name(f"{path.name}.part")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, as if the training had never stopped.

        Order and randomness are functions of the step, so they need no state. Raises WeightsCorrupt where it is none,
        and SettingsInvalid where it is another training's.
        """
        state = _read(path, self.networks.device)
        theirs = TrainingConfig.model_validate_json(state["config"]).model_dump(exclude=FREE)
        ours = self.config.model_dump(exclude=FREE)
        different = sorted(name for name in ours if ours[name] != theirs[name])
        if different:
            raise SettingsInvalid(f"{path} is of a training with another {', '.join(different)}; go on with the same.")
        _copy(state["weights"], self.weights)
        _copy(state["ema"], self.ema.weights)
        self._optimiser.load(state["optimiser"])
        self.step = state["step"]

    def load_weights(self, path: Path) -> None:
        """Start from the mean weights of another training's checkpoint, or from a `pulid_flux_*.safetensors`."""
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            _copy(load_file(path), self.weights)
        else:
            _copy(_read(path, self.networks.device)["ema"], self.weights)
        self.ema = Ema(self.weights, self.config.ema)

    def save_pulid(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the mean weights as `pulid_flux_*.safetensors` is written."""
        save_pulid(path, self.ema.weights, dtype)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    if source.keys() != target.keys():
        raise WeightsCorrupt("The checkpoint is of networks of another size.")
    for name, weight in target.items():
        weight.copy_(source[name])


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsCorrupt(f"{path} cannot be read as a checkpoint; go on from an older one.") from error
    return state


class _Log:
    """Figures for TensorBoard; nowhere without a folder."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, step: int, figures: Figures) -> None:
        if self._folder is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # of steps that are taken again after a cut, the last ones count
            self._writer = SummaryWriter(self._folder, purge_step=step)
        for name, value in figures.items():
            self._writer.add_scalar(f"training/{name}", value, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

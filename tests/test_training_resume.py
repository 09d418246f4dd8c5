"""A training that is cut goes on as if nothing had been; two workers train what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pipeline.errors import SettingsInvalid, WeightsCorrupt
from pipeline.training.workers import Workers
from tests import training as toy

WORKER = """
import sys, torch
from pathlib import Path
from tests import training as toy
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
from pipeline.training.workers import distributed
trainer = toy.trainer(toy.config(), distributed())
trainer.run(3)
trainer.save(folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_training_that_is_cut_and_resumed_equals_one_that_was_not(tmp_path: Path, optimiser: str):
    """To the bit: weights, their mean, the optimiser's state, and every figure on the way."""
    settings = toy.config(optimiser=optimiser)
    whole: dict[int, object] = {}
    uncut = toy.trainer(settings)
    uncut.run(6, lambda step, figures: whole.update({step: dict(figures)}))

    parts: dict[int, object] = {}
    first = toy.trainer(settings)
    first.run(3, lambda step, figures: parts.update({step: dict(figures)}))
    first.save(tmp_path / "checkpoint.pt")
    second = toy.trainer(settings)
    second.load(tmp_path / "checkpoint.pt")
    second.run(6, lambda step, figures: parts.update({step: dict(figures)}))

    assert parts == whole
    uncut.save(tmp_path / "uncut.pt")
    second.save(tmp_path / "resumed.pt")
    states = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("uncut", "resumed")]
    for part in ("weights", "ema"):
        assert_close(states[1][part], states[0][part], rtol=0, atol=0)
    for mine, theirs in zip(states[1]["optimiser"], states[0]["optimiser"], strict=True):
        assert_close(mine["state"], theirs["state"], rtol=0, atol=0)
        assert mine["param_groups"] == theirs["param_groups"]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path):
    """Going on with another batch size or rate would be neither training; where its log goes does not matter."""
    path = tmp_path / "checkpoint.pt"
    toy.trainer().save(path)
    with pytest.raises(SettingsInvalid, match="batch_size, lr_idformer"):
        toy.trainer(toy.config(batch_size=6, lr_idformer=1.0)).load(path)
    toy.trainer(toy.config(log_dir=str(tmp_path / "log"))).load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsCorrupt):
        toy.trainer().load(path)


def test_the_next_stage_starts_from_the_mean_weights(tmp_path: Path):
    """Its steps, optimiser and running mean are new."""
    first = toy.trainer(toy.config(stage=1))
    first.run(3)
    first.save(tmp_path / "stage1.pt")
    second = toy.trainer(toy.config(stage=2))
    second.load_weights(tmp_path / "stage1.pt")
    assert second.step == 0
    for name, mean in first.ema.weights.items():
        assert torch.equal(second.weights[name], mean)
        assert torch.equal(second.ema.weights[name], mean)


def test_two_workers_train_what_one_does(tmp_path: Path):
    """The same global batch in halves, each in a process of its own: the same weights within float noise."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    alone = toy.trainer()
    alone.run(3)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, weight in alone.weights.items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        assert_close(ranks[0]["weights"][name], weight.detach(), atol=2e-5, rtol=1e-4)


def test_figures_are_written_for_tensorboard(tmp_path: Path):
    """Every figure of every step, readable by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = toy.trainer(toy.config(log_dir=str(tmp_path)))
    figures = trainer.run(2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"training/{name}" for name in figures}
    assert [event.step for event in events.Scalars("training/flow")] == [1, 2]
    assert events.Scalars("training/flow")[-1].value == pytest.approx(figures["flow"])


def test_steps_that_are_taken_again_are_logged_once(tmp_path: Path):
    """A training that was cut after its checkpoint goes on with the same log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = toy.config(log_dir=str(tmp_path / "log"))
    cut = toy.trainer(config)
    cut.run(1)
    cut.save(tmp_path / "checkpoint.pt")
    cut.run(3)
    resumed = toy.trainer(config)
    resumed.load(tmp_path / "checkpoint.pt")
    resumed.run(4)
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.step for event in events.Scalars("training/flow")] == [1, 2, 3, 4]


def test_a_configuration_survives_json():
    """It is written into every checkpoint, and read again when a training goes on."""
    settings = toy.config(times={"mean": 1.0, "uniform_share": 0.5})
    assert type(settings).model_validate_json(json.dumps(settings.model_dump())) == settings


def test_gradients_are_summed_in_few_messages():
    """Every tensor keeps its place and shape; a message is sent when it is long enough, or with the last tensor."""
    sent = []

    def total(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.numel())
        return 2 * tensor

    tensors = [torch.ones(2, 3), torch.full((9,), 2.0), torch.tensor(3.0), torch.zeros(0, 4), torch.ones(5)]
    before = [tensor.clone() for tensor in tensors]
    Workers(0, 2, total, bucket=8).add_up(tensors)
    assert sent == [6 + 9, 1 + 0 + 5]
    for one, other in zip(tensors, before, strict=True):
        assert torch.equal(one, 2 * other)

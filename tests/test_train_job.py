"""The training on Ray Train: prepared through Ray Data, two workers, one of them killed in the middle."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.jobs import train
from pipeline.errors import SettingsInvalid
from pipeline.settings import Settings
from pipeline.training.data import Prepared
from pipeline.training.estimate import estimate
from tests import training as toy
from tests.face_models import red_squares

PEOPLE = ("one", "one", "two", "two", None, "three")


def _rows(folder: Path) -> Path:
    """Six people, a picture of nobody, and a line that is no row."""
    lines = []
    for number, person in enumerate(PEOPLE):
        corner = (32 * number, 64)
        Image.fromarray(red_squares((256, 256), corner, edge=96)).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": f"portrait {number}", "person": person}))
    Image.fromarray(red_squares((256, 256))).save(folder / "nobody.png")
    lines += [json.dumps({"image": "nobody.png", "prompt": "a wall"}), "{"]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def _die_once(mark: Path, done: int, figures: Mapping[str, float]) -> None:
    """One worker is killed after step 3, after the checkpoint of step 2."""
    import ray.train

    if done == 3 and ray.train.get_context().get_world_rank() == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")  # Ray's own, in this process
def test_a_killed_worker_changes_nothing(ray_here: None, tmp_path: Path, untrained: Path) -> None:
    """All go on from the last checkpoint, and end with the same figures and the same file as without the accident."""
    settings = Settings(miniature_dir=untrained, device="cpu")
    config = toy.config(preset="miniature", steps=5, checkpoint_every=2)
    recogniser = untrained / "antelopev2" / "arcface_miniature.onnx"
    common = {"recogniser": recogniser, "size": 256, "text_tokens": 32, "workers": 2}
    rows = _rows(tmp_path)

    calm = train.Job(settings, config, rows, tmp_path / "calm.safetensors", tmp_path / "work", **common)
    figures = train.run(calm)
    places = calm.places()
    prepared = Prepared(places.examples)
    assert (len(prepared), prepared.left_out) == (6, {"no_face": 1, "invalid_request": 1})
    assert figures["step"] == 5
    assert {"flow", "semantic", "layout", "faces"} <= figures.keys()

    hit = train.Job(settings, config, rows, tmp_path / "hit.safetensors", tmp_path / "work", **common)
    assert train.run(hit, partial(_die_once, tmp_path / "mark")) == figures
    assert (tmp_path / "mark").exists()
    assert hit.output.read_bytes() == calm.output.read_bytes()
    assert json.loads(hit.output.with_suffix(".json").read_text()) == figures
    events = EventAccumulator(str(hit.places().log_dir)).Reload()
    assert [event.step for event in events.Scalars("training/flow")] == [1, 2, 3, 4, 5]


def test_a_configuration_comes_from_file_pairs_and_flags(tmp_path: Path) -> None:
    """Later ones win; what is unknown or impossible is named."""
    (tmp_path / "config.json").write_text('{"steps": 7, "batch_size": 16, "optimiser": "adamw"}')
    changes = ["batch_size=8", "optimiser=muon", 'times={"mean": 1.0}']
    config = train.training_config(tmp_path / "config.json", changes, stage=2, preset=None)
    assert (config.steps, config.batch_size, config.optimiser, config.stage) == (7, 8, "muon", 2)
    assert config.times.mean == 1.0
    for wrong, named in (("speed=3", "speed"), ("batch_size=0", "batch_size"), ("stage=4", "stage")):
        with pytest.raises(SettingsInvalid, match=named):
            train.training_config(None, [wrong])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--set", "steps=none"], "steps"),
        (["--preset", "huge"], "preset"),
        (["--start", "nowhere.pt"], "nowhere.pt is missing"),
        (["--stage", "2"], "--recogniser"),
        (["--workers", "3"], "multiples of the workers, not 3"),
        (["--workers", "0"], "not 0"),
        (["--output", "pulid.pt"], ".safetensors"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl is missing"),
    ],
)
def test_a_job_that_cannot_begin_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], named: str
) -> None:
    """One sentence and exit status 1, without Ray."""
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    given = ["--input", str(rows), "--output", str(tmp_path / "pulid.safetensors"), "--preset", "miniature"]
    assert train.main([*given, *wrong]) == 1
    assert named in capsys.readouterr().err


def test_what_a_training_depends_on_decides_where_its_parts_are(tmp_path: Path, untrained: Path) -> None:
    """Other rows or another recogniser are prepared elsewhere; another start under the old name begins anew."""
    files = {name: tmp_path / name for name in ("rows.jsonl", "start.pt", "net.onnx")}
    for file in files.values():
        file.write_text("before")
    settings, config = Settings(miniature_dir=untrained, device="cpu"), toy.config(preset="miniature")
    rows, start, recogniser = files.values()
    job = train.Job(settings, config, rows, tmp_path / "out.safetensors", tmp_path / "work", start, recogniser)
    first = job.places()
    assert job.places() == first
    assert first.log_dir == tmp_path / "work" / "logs" / first.name

    free = config.model_copy(update={"log_dir": "/logs", "gradient_checkpointing": True})
    assert replace(job, config=free).places() == replace(first, log_dir=Path("/logs") / first.name)

    start.write_text("after")
    another = job.places()
    assert another.examples == first.examples
    assert another.name != first.name
    for file in (rows, recogniser):
        before = job.places()
        file.write_text("after")
        assert job.places().examples != before.examples
        assert job.places().name != before.name


def test_the_estimate_counts_the_real_networks() -> None:
    """Parameters as in the official files; a stage takes what the one before takes, and more."""
    stages = [estimate(toy.config(stage=stage, batch_size=32), 768, 8) for stage in (1, 2, 3)]
    counts = stages[0].parameters
    assert counts["FLUX.1 [dev], frozen"] == 11_901_408_320
    assert counts["IDFormer, trained"] + counts["cross-attentions, trained"] == 571_033_600
    assert stages[0].seconds < stages[1].seconds < stages[2].seconds
    assert "11,901.4 M parameters" in str(stages[0])

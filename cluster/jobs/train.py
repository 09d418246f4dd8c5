"""PuLID's training on Ray Train: JSONL and pictures in, `pulid_flux_*.safetensors` out.

    ray job submit -- python -m cluster.jobs.train --input rows.jsonl --output pulid.safetensors --preset flux-dev \
        --stage 2 --start stage1/checkpoint.pt --recogniser w600k_r50.onnx --workers 8 --set batch_size=32

Rows are `{"image": path, "prompt": text, "person": name}`. They are prepared once, into a folder in `--work`, and found
there by the next run on the same rows, with the same recogniser. Workers train on one global batch together; where one
dies, all go on from the last checkpoint, and the result is what it would have been. A job that was stopped is started
again by the same command. Figures of every step, for TensorBoard, are in `--work`/logs.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.jobs.training import Job, Places
from pipeline.errors import PipelineError, SettingsInvalid
from pipeline.settings import Settings
from pipeline.training.config import TrainingConfig

CHECKPOINT, RESULT = "checkpoint.pt", "pulid.safetensors"


AfterStep = Callable[[int, Mapping[str, float]], None]


def run(job: Job, after_step: AfterStep | None = None) -> dict[str, float]:
    """Prepare what is not prepared yet, train, and write the output; returns the last figures.

    after_step is called in every worker after every step. Raises SettingsInvalid and WeightsError; where a file is
    missing or a number does not fit, before anything is begun.
    """
    job.check()
    places = job.places()
    _prepared(job, places)
    result = _fit(job, places, after_step)
    figures: dict[str, float] = dict(result.metrics or {})
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with result.checkpoint.as_directory() as folder:
        for name, target in ((RESULT, job.output), (CHECKPOINT, job.output.with_suffix(".pt"))):
            partial = target.with_name(f"{target.name}.part")
            shutil.copyfile(Path(folder) / name, partial)
            partial.replace(target)
    job.output.with_suffix(".json").write_text(json.dumps(figures))
    return figures


def _prepared(job: Job, places: Places) -> None:
    import ray

    from cluster.jobs.prepare import Preparation, prepare
    from pipeline.training.data import INDEX, Prepared

    if not (places.examples / INDEX).exists():
        cpus = int(ray.cluster_resources().get("CPU", 1))
        preparation = Preparation(
            job.settings,
            job.config,
            job.input,
            places.examples,
            job.size,
            job.text_tokens,
            job.recogniser,
            places.recipe,
            detectors=cpus // 2,
            encoders=job.workers if job.gpu else cpus // 2,
            gpus=1.0 if job.gpu else 0.0,
        )
        prepare(preparation)
    examples = Prepared(places.examples)
    examples.check(places.recipe)
    print(f"{len(examples)} examples; rows left out: {examples.left_out or 'none'}", flush=True)


def _fit(job: Job, places: Places, after_step: AfterStep | None) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    logged = replace(job, config=job.config.model_copy(update={"log_dir": str(places.log_dir)}))
    trainer = TorchTrainer(
        _train,
        train_loop_config={"job": logged, "examples": places.examples, "after_step": after_step},
        torch_config=TorchConfig(backend="nccl" if job.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=job.workers, use_gpu=job.gpu),
        run_config=RunConfig(
            name=places.name,
            storage_path=str(job.work / "runs"),
            failure_config=FailureConfig(max_failures=job.retries),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    return trainer.fit()


def _train(given: dict[str, Any]) -> None:
    """One worker, from the last checkpoint if there is one."""
    import ray.train
    import ray.train.torch

    from pipeline.training.build import load_networks
    from pipeline.training.data import Prepared
    from pipeline.training.trainer import Trainer

    job: Job = given["job"]
    device = str(ray.train.torch.get_device()) if job.gpu else "cpu"
    networks = load_networks(job.settings.model_copy(update={"device": device}), job.config, job.recogniser)
    examples = Prepared(given["examples"])
    trainer = Trainer(networks, job.config, examples, examples.prompts("id"), examples.prompts("contrast"))
    last = ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            trainer.load(Path(folder) / CHECKPOINT)
    elif job.start is not None:
        trainer.load_weights(job.start)

    def after_step(done: int, figures: Mapping[str, float]) -> None:
        if done % job.config.checkpoint_every == 0 or done == job.config.steps:
            _report(trainer, done, figures)
        if given["after_step"] is not None:
            given["after_step"](done, figures)

    trainer.run(after_step=after_step)


def _report(trainer: Any, done: int, figures: Mapping[str, float]) -> None:
    """Figures from every worker, and the checkpoint, which all of them hold alike, from the first."""
    import ray.train

    metrics = {"step": done, **figures}
    if trainer.workers.rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(Path(folder) / CHECKPOINT)
        trainer.save_pulid(Path(folder) / RESULT)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def training_config(file: Path | None, changes: Sequence[str], **flags: Any) -> TrainingConfig:
    """A configuration from a JSON file, `name=value` pairs and flags, later ones first; raises SettingsInvalid."""
    try:
        fields = {} if file is None else json.loads(file.read_text())
        for change in changes:
            name, _, text = change.partition("=")
            fields[name] = _value(text)
        return TrainingConfig.model_validate(fields | {n: v for n, v in flags.items() if v is not None})
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise SettingsInvalid(f"The configuration of the training cannot be used: {told}.") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # a word


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.jobs.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--input", type=Path, help="JSONL; images are relative to its folder")
    parser.add_argument("--output", type=Path, help="PuLID's file; .pt and .json of the same name go beside it")
    parser.add_argument("--work", type=Path, help="folder that every node sees; default: OUTPUT.work")
    parser.add_argument("--preset", help="the set of models (PULID_PRESET)")
    parser.add_argument("--stage", type=int, help="1: flow loss, 2: and ID loss, 3: and alignment")
    parser.add_argument("--start", type=Path, help="the stage before: its .pt, or any PuLID file")
    parser.add_argument("--recogniser", type=Path, help="ONNX file of the ID loss's recogniser, from stage 2 on")
    parser.add_argument("--config", type=Path, help="JSON file with fields of TrainingConfig")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one field of TrainingConfig")
    parser.add_argument("--size", type=int, default=768, help="edge of the pictures in pixels")
    parser.add_argument("--text-tokens", type=int, default=128, help="tokens that T5 reads")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--estimate", action="store_true", help="only print what a training of flux-dev takes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        settings = Settings.from_environment(**({} if given.preset is None else {"preset": given.preset}))
        config = training_config(given.config, given.set, stage=given.stage, preset=settings.preset)
        if given.estimate:
            from pipeline.training.estimate import estimate

            print(estimate(config, given.size, given.workers))
            return 0
        if given.input is None or given.output is None:
            parser.error("--input and --output are needed")
        output = given.output.absolute()  # workers have working directories of their own
        figures = run(
            Job(
                settings,
                config,
                given.input.absolute(),
                output,
                output.with_suffix(".work") if given.work is None else given.work.absolute(),
                None if given.start is None else given.start.absolute(),
                None if given.recogniser is None else given.recogniser.absolute(),
                given.size,
                given.text_tokens,
                given.workers,
                given.gpu,
            )
        )
    except PipelineError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

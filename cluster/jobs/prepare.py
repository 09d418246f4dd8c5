"""Rows with pictures -> prepared examples, through Ray Data: faces on CPUs, then VAE and text encoders on GPUs.

Called by cluster/jobs/train.py; by itself nothing but a function. Shards are blocks of the input, so what is prepared
does not depend on how many actors there were, nor in which order they ended.
"""

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from deployments.problems import unforeseen
from pipeline.errors import PipelineError
from pipeline.settings import Settings
from pipeline.training.config import TrainingConfig

SHARD = 64  # rows of the input in one shard, and in one call of an actor
Block = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is prepared, from what, into where.

    size: edge of the pictures in pixels. text_tokens: what T5 reads. recogniser: ONNX file of the ID loss's, or None.
    recipe: what index.json says of all this. detectors, encoders: actors at most; gpus: of one encoder.
    """

    settings: Settings
    config: TrainingConfig
    input: Path
    folder: Path
    size: int
    text_tokens: int
    recogniser: Path | None
    recipe: Mapping[str, Any]
    detectors: int = 1
    encoders: int = 1
    gpus: float = 0.0


def prepare(job: Preparation) -> Counter[str]:
    """Prepare every row, and write index.json when all is done; returns the rows left out, by error code."""
    job.folder.mkdir(parents=True, exist_ok=True)
    lines = [line for line in job.input.read_bytes().split(b"\n") if line.strip()]
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # a job's log is read as a file
    blocks = [
        {"work": pickle.dumps((f"shard-{start // SHARD:06d}.safetensors", lines[start : start + SHARD]))}
        for start in range(0, len(lines), SHARD)
    ]
    shards: list[tuple[str, list[str | None]]] = []
    left_out: Counter[str] = Counter()
    if blocks:
        dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks))
        dataset = dataset.map_batches(
            FindFaces, fn_constructor_args=(job,), batch_size=1, num_cpus=1, compute=_pool(job.detectors)
        )
        encoders: dict[str, Any] = {"num_gpus": job.gpus} if job.gpus else {"num_cpus": 1}
        dataset = dataset.map_batches(
            EncodeExamples, fn_constructor_args=(job,), batch_size=1, compute=_pool(job.encoders), **encoders
        )
        for row in dataset.iter_rows():
            name, people, errors = pickle.loads(row["work"])
            left_out += errors
            if people:
                shards.append((name, people))
    from pipeline.training.data import write_index

    write_index(job.folder, job.recipe, shards, left_out)
    return left_out


def _pool(actors: int) -> ActorPoolStrategy:
    return ActorPoolStrategy(min_size=1, max_size=max(1, actors))


class FindFaces:
    """The FaceDetector stage: lines -> subjects; whatever goes wrong with a row is counted by its code."""

    def __init__(self, job: Preparation) -> None:
        from pipeline.faces import FaceDetector
        from pipeline.photos import PhotoReader

        self._job = job
        settings = job.settings.model_copy(update={"device": "cpu"})
        self._detector, self._reader = FaceDetector.load(settings), PhotoReader(settings)

    def __call__(self, block: Block) -> Block:
        """One shard's lines, pickled -> its subjects and errors, pickled."""
        from pipeline.training.data import find_subject, parse

        name, lines = pickle.loads(block["work"][0])
        subjects, errors = [], Counter[str]()
        for line in lines:
            try:
                subject = find_subject(
                    parse(line), self._job.input.parent, self._job.size, self._detector, self._reader
                )
                subjects.append(subject)
            except PipelineError as error:
                errors[error.code] += 1
            except Exception as error:  # one row must not end a job of millions
                errors[unforeseen(error, f"A row of {name}, faces,").code] += 1
        return _block((name, subjects, errors))


class EncodeExamples:
    """Subjects -> a shard on disk; the first of these actors also writes the losses' prompts."""

    def __init__(self, job: Preparation) -> None:
        from pipeline import checkpoints
        from pipeline.text import TextEncoder
        from pipeline.training.data import PROMPTS, ExampleEncoder, write_prompts
        from pipeline.training.recogniser import OnnxNetwork

        self._folder = job.folder
        settings = job.settings if job.gpus else job.settings.model_copy(update={"device": "cpu"})
        vae = checkpoints.load_vae(checkpoints.files(settings), settings)
        recogniser = None if job.recogniser is None else OnnxNetwork(job.recogniser).to(checkpoints.device(settings))
        self._encoder = ExampleEncoder(vae, TextEncoder.load(settings), job.text_tokens, recogniser)
        if not (job.folder / PROMPTS).exists():
            write_prompts(job.folder, job.config, self._encoder)

    def __call__(self, block: Block) -> Block:
        """One shard's subjects, pickled -> its name, the person of each example, and the errors, pickled."""
        from pipeline.training.data import write_shard

        name, subjects, errors = pickle.loads(block["work"][0])
        if subjects:
            write_shard(self._folder, name, [self._encoder.encode(subject) for subject in subjects])
        return _block((name, [subject.row.person for subject in subjects], errors))


def _block(work: Sequence[Any]) -> Block:
    return {"work": np.array([pickle.dumps(tuple(work))], dtype=object)}

"""A training job: what it reads and writes, what it depends on, and whether it can begin."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pipeline.download import sha256
from pipeline.errors import SettingsInvalid, WeightsMissing
from pipeline.settings import Settings
from pipeline.training.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Job:
    """What a run reads and writes, and on how many workers.

    work: a folder that every node sees, for prepared examples, checkpoints and logs. start: a checkpoint or PuLID file
    to begin with. size: edge of the pictures. recogniser: the ID loss's. gpu: one for each worker. retries: how often
    dead workers are replaced.
    """

    settings: Settings
    config: TrainingConfig
    input: Path
    output: Path
    work: Path
    start: Path | None = None
    recogniser: Path | None = None
    size: int = 768
    text_tokens: int = 128
    workers: int = 1
    gpu: bool = False
    retries: int = 3

    def check(self) -> None:
        """Raises WeightsMissing and SettingsInvalid, for what would otherwise be found out hours later."""
        for option, file in (("input", self.input), ("start", self.start), ("recogniser", self.recogniser)):
            if file is not None and not file.is_file():
                raise WeightsMissing(f"{file} is missing: the file that --{option} names.")
        if self.output.suffix != ".safetensors":
            raise SettingsInvalid(f"--output is {self.output.name}; a PuLID file has to end in .safetensors.")
        if self.config.stage > 1 and self.recogniser is None:
            raise SettingsInvalid("From stage 2 on the ID loss needs --recogniser: an ArcFace net as an ONNX file.")
        config = self.config
        sizes = (config.batch_size, config.id_batch_size, config.align_batch_size)
        if any(size % self.workers for size in sizes):
            raise SettingsInvalid(f"Batch sizes {sizes} have to be multiples of the {self.workers} workers.")

    def recipe(self) -> dict[str, Any]:
        """What the prepared examples depend on; of the pictures only their paths, which are in the input."""
        from pipeline.training.data import recipe

        recogniser = None if self.recogniser is None else sha256(self.recogniser)
        return recipe(self.config, self.size, self.text_tokens, sha256(self.input), recogniser)

    @property
    def examples(self) -> Path:
        """Where examples of this recipe are prepared: another one has another folder."""
        return self.work / f"examples-{_fingerprint(self.recipe())}"

    @property
    def name(self) -> str:
        """One name for one training: the same command goes on, another one does not begin in its middle."""
        decides = {
            "config": self.config.model_dump(mode="json", exclude={"log_dir", "checkpoint_every"}),
            "examples": self.recipe(),
            "start": None if self.start is None else sha256(self.start),
            "output": str(self.output),
        }
        return f"stage{self.config.stage}-{_fingerprint(decides)}"

    def logged(self) -> Self:
        """The same with a folder for TensorBoard, where the configuration names none."""
        if self.config.log_dir is not None:
            return self
        return replace(self, config=self.config.model_copy(update={"log_dir": str(self.work / "logs" / self.name)}))


def _fingerprint(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]

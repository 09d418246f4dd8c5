"""A training job: what it reads and writes, what it depends on, and whether it can begin."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import weights
from pipeline.download import sha256
from pipeline.errors import SettingsInvalid
from pipeline.settings import Settings
from pipeline.training.config import FREE, TrainingConfig

NOT_PREPARED_WITH = {"flux", "pulid", "eva_clip", "judge"}  # roles of models that no prepared example comes from


@dataclass(frozen=True, slots=True)
class Places:
    """Where a job's parts are, by what they depend on: with anything else they would be elsewhere.

    recipe: what the prepared examples depend on. name: of this training; the same command goes on, another one does not
    begin in its middle. log_dir: for TensorBoard.
    """

    recipe: Mapping[str, Any]
    examples: Path
    name: str
    log_dir: Path


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
        """Raises SettingsInvalid and WeightsMissing for files that are not there and numbers that do not fit."""
        for option, file in (("input", self.input), ("start", self.start), ("recogniser", self.recogniser)):
            if file is not None and not file.is_file():
                raise SettingsInvalid(f"{file} is missing: the file that --{option} names.")
        if self.output.suffix != ".safetensors":
            raise SettingsInvalid(f"--output is {self.output.name}; a PuLID file has to end in .safetensors.")
        if self.config.stage > 1 and self.recogniser is None:
            raise SettingsInvalid("From stage 2 on the ID loss needs --recogniser: an ArcFace net as an ONNX file.")
        self.config.check_workers(self.workers)
        for role in ("flux", "eva_clip"):
            weights.locate(self.settings).path(role)

    def places(self) -> Places:
        """Reads the input, the recogniser and the start once, to tell them from others. Raises WeightsError."""
        recipe = self._recipe()
        decides = {
            "config": self.config.model_dump(mode="json", exclude=FREE),
            "examples": recipe,
            "start": None if self.start is None else sha256(self.start),
            "output": str(self.output),
        }
        name = f"stage{self.config.stage}-{_fingerprint(decides)}"
        logs = self.work / "logs" if self.config.log_dir is None else Path(self.config.log_dir)
        return Places(recipe, self.work / f"examples-{_fingerprint(recipe)}", name, logs / name)

    def _recipe(self) -> dict[str, Any]:
        """Of the pictures only their paths count, and of weights that were never verified only that they were not."""
        from pipeline.training.data import recipe

        files = weights.locate(self.settings)
        roles = [spec.role for spec in files.preset.specs if spec.role not in NOT_PREPARED_WITH]
        read = {
            "folder": str(self.input.parent),
            "rows": sha256(self.input),
            "models": files.hashes(*roles),
            "recogniser": None if self.recogniser is None else sha256(self.recogniser),
        }
        return recipe(self.config, self.size, self.text_tokens, read)


def _fingerprint(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]

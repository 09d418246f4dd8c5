"""The folder of the miniature's files: where each belongs, how transformers' models are written, the manifest."""

from pathlib import Path
from typing import Any

from pipeline.download import sha256
from pipeline.manifest import Entry, Manifest
from pipeline.presets import PRESETS
from pipeline.tensors import write_tensors
from pipeline.weights import WeightFiles

PRESET = PRESETS["miniature"]


def place(folder: Path, role: str) -> Path:
    """Where the file or folder of a role belongs; the folder around it is made."""
    spec = WeightFiles(PRESET, Manifest(folder)).spec(role)
    path = folder / spec.folder / (spec.files[0].name if spec.files else "")
    (path.parent if spec.files else path).mkdir(parents=True, exist_ok=True)
    return path


def save_transformer(model: Any, folder: Path) -> None:
    """Write a model of transformers, configuration and safetensors, beside its tokenizer."""
    model.config.save_pretrained(folder)
    tensors = dict(model.state_dict())
    tensors.pop("encoder.embed_tokens.weight", None)  # T5's second name for `shared.weight`
    # By hand, for the model's own save_pretrained draws a progress bar.
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def write_manifest(folder: Path) -> None:
    """Read the files of every role and write manifest.json, by which they are verified from then on.

    Without times of change, which a checkout or an installation sets anew: the files are small enough to be read at
    each start. Raises WeightsMissing where one is not there.
    """
    files = WeightFiles(PRESET, Manifest(folder))
    for spec in PRESET.specs:
        files.path(spec.role)
        for path in files.members(spec.role):
            path.chmod(path.stat().st_mode | 0o444)  # safetensors lets nobody but the writer read
            files.manifest.entries[files.name(path)] = Entry(sha256(path), path.stat().st_size)
    files.manifest.write()

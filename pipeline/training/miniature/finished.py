"""The networks that earlier stages left, through the loaders of production: what a stage reads is what a user will."""

from pathlib import Path

from pipeline import checkpoints
from pipeline.settings import Settings
from pipeline.weights import WeightFiles


def finished(weights: Path) -> tuple[WeightFiles, Settings]:
    """The arguments of checkpoints.load_vae and its like, for a folder in which some files may be missing yet."""
    settings = Settings(preset="miniature", miniature_dir=weights, device="cpu", dtype="float32")
    return checkpoints.files(settings), settings

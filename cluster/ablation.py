"""`make ablation`: the paper's ablation in miniature, the three stages of one training side by side in one table.

Reads what `make miniature` left in its work folder; every other network is the one of --weights, and people, prompts
and noise are the same for all three.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.miniature import SHIPPED

if TYPE_CHECKING:
    from pipeline.evaluation.run import Results

STAGES = {"flow": "flow loss only", "identity": "+ ID loss", "alignment": "+ alignment"}
COLUMNS = (
    "likeness_1",
    "likeness_0.5",
    "likeness_0",
    "top1",
    "pix1",
    "adherence_1",
    "adherence_0",
    "clip_t_1",
    "clip_i_1",
)


def main(
    work: Annotated[Path, typer.Option(help="The work folder of `make miniature`.", file_okay=False)] = Path(
        "build/miniature"
    ),
    weights: Annotated[
        Path, typer.Option(help="The build's finished files; the shipped ones, if not said.", file_okay=False)
    ] = SHIPPED,
    people: Annotated[int, typer.Option(min=2, help="How many held-out people.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Which people, prompts and noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=30, help="Steps of a picture.")] = 20,
    to: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", dir_okay=False)] = None,
) -> None:
    """Evaluate the adapter that each stage ended with, and print one table."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for stage in STAGES:
        pulid = work / stage / "pulid_flux_miniature.safetensors"
        if not pulid.exists():
            raise SystemExit(f"{pulid} is missing; run `make miniature` first.")
        results = _evaluated(pulid, weights, people, seed, steps)
        found[stage] = {key: (results.figures[key].value, results.figures[key].error) for key in COLUMNS}
        print(f"{stage} is measured", file=sys.stderr, flush=True)
    print("| stages | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for stage, figures in found.items():
        cells = " | ".join(f"{value:.3f} ± {error:.3f}" for value, error in figures.values())
        print(f"| {STAGES[stage]} | {cells} |")
    if to is not None:
        to.write_text(json.dumps({"people": people, "seed": seed, "steps": steps, **found}, indent=1))


def _evaluated(pulid: Path, weights: Path, people: int, seed: int, steps: int) -> "Results":
    """The evaluation of a miniature with another adapter."""
    from pipeline.evaluation import run, studio
    from pipeline.evaluation.painting import Format, conditions
    from pipeline.evaluation.people import drawn
    from pipeline.miniature.configs import PICTURE_SIZE
    from pipeline.settings import Settings

    with tempfile.TemporaryDirectory(prefix="pulid-ablation-") as name:
        folder = Path(name)
        for path in weights.absolute().iterdir():
            if path.name not in ("pulid", "manifest.json"):  # the manifest knows the finished adapter
                (folder / path.name).symlink_to(path)
        (folder / "pulid").mkdir()
        (folder / "pulid" / pulid.name).symlink_to(pulid.absolute())
        settings = Settings(preset="miniature", miniature_dir=folder)
        subjects, cases = drawn(people, seed)
        form = Format(PICTURE_SIZE, PICTURE_SIZE, steps)
        painter, judges = studio.load(settings, form, studio.JudgeFiles.of(settings), subjects)
        return run.evaluate(subjects, cases, conditions((0.0, 0.5, 1.0), num_steps=steps), painter.paint, judges)


if __name__ == "__main__":
    typer.run(main)

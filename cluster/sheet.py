"""The pictures that people look at first, on the drawn world: `python -m cluster.sheet docs/images`.

sheet.png: people under rising id_weights. mixed.png: a person of two people's photos. together.png: two people in one
picture through masks. tradeoff.png: likeness against prompt adherence as id_weight and start_step vary; conditions.png:
all figures side by side. The people are the first of seed 0: nobody has picked them.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.console import given
from pipeline.evaluation import people, report, run, sheet, studio
from pipeline.evaluation.painting import Format, conditions
from pipeline.faces import Pixels
from pipeline.miniature.configs import PICTURE_SIZE
from pipeline.settings import Settings

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
STARTS = (0, 1, 2, 4, 6, 8, 10)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw everything into a folder, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/images"))
    parser.add_argument("--seed", type=int, default=0, help="which people, prompts and noise")
    parser.add_argument("--people", type=int, default=6, help="rows of the sheet")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--measured", type=int, default=30, help="people of the plots; 0: no plots")
    parser.add_argument("--miniature-dir", type=Path, help="the miniature from here")
    draw(parser.parse_args(arguments))


def draw(options: argparse.Namespace) -> None:
    """All sheets, and the plots."""
    started = time.perf_counter()
    settings = Settings.from_environment(**given(preset="miniature", miniature_dir=options.miniature_dir))
    options.folder.mkdir(parents=True, exist_ok=True)
    subjects, cases = people.drawn(max(options.people + options.people % 2, 2, options.measured), options.seed)
    form = Format(PICTURE_SIZE, PICTURE_SIZE, options.steps)
    painter, judges = studio.load(settings, form, studio.JudgeFiles.of(settings), subjects)
    pairs = list(zip(subjects[0:4:2], subjects[1:4:2], strict=False))
    few = cases[: len(pairs)]
    for name, rgb in {
        "sheet": sheet.people_sheet(painter, subjects, cases[: options.people]),
        "mixed": sheet.mixed_sheet(painter, pairs, few),
        "together": sheet.together_sheet(painter, pairs, few),
    }.items():
        _save(options.folder / f"{name}.png", rgb)
    if options.measured:
        _plot(options, painter, judges, subjects, cases)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


def _plot(options: argparse.Namespace, painter: Any, judges: run.Judges, subjects: Any, cases: Any) -> None:
    wanted = conditions(WEIGHTS, [step for step in STARTS if step < options.steps], options.steps)
    measured = cases[: options.measured]
    results = run.evaluate(subjects, measured, wanted, painter.paint, judges, lambda line: print(line, file=sys.stderr))
    print(report.table(results))
    for path in report.plots(results, options.folder):
        print(path)


def _save(path: Path, rgb: Pixels) -> None:
    path.write_bytes(people.png(rgb))
    print(path)


if __name__ == "__main__":
    main()

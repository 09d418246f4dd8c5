"""`pulid evaluate`: how well the pictures keep a face and follow their prompts, in figures with standard errors."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import PipelineError, SettingsInvalid
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.evaluation.people import Case, Subject
    from pipeline.evaluation.run import Results


def evaluate(  # noqa: PLR0913 - each is an option of the command line
    preset: Annotated[
        str | None, typer.Option(help="The set of models (PULID_PRESET): miniature, flux-dev, ...")
    ] = None,
    count: Annotated[int, typer.Option("--people", min=1, help="How many held-out people of the drawn world.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Which people, prompts and noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=30, help="Steps of a picture.")] = 20,
    id_weights: Annotated[str, typer.Option(help="Weights from 0 to 3, parted by commas.")] = "0,0.5,1",
    start_steps: Annotated[str, typer.Option(help="First steps of the identity, at weight 1.")] = "0",
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.", dir_okay=False)] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw plots into this folder.", file_okay=False)] = None,
    people_dir: Annotated[
        Path | None, typer.Option(help="Real people instead: a folder of photos per person.", file_okay=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts for them, one a line; else the paper's 20.", dir_okay=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pictures per person and prompt; the paper makes 4.")] = 1,
    judge: Annotated[
        Path | None, typer.Option(help="The recogniser that judges, ONNX; CurricularFace, say.", dir_okay=False)
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="A CLIPModel's folder, for CLIP-T and CLIP-I.", file_okay=False)
    ] = None,
    width: Annotated[int | None, typer.Option(help="Of the pictures; the preset's own where not said.")] = None,
    height: Annotated[int | None, typer.Option(help="Of the pictures; the preset's own where not said.")] = None,
    miniature_dir: Annotated[
        Path | None, typer.Option(help="The miniature from here (PULID_MINIATURE_DIR).", file_okay=False)
    ] = None,
) -> None:
    """Draw people under several id_weights and start_steps, and measure likeness, adherence, copying and colours.

    On the drawn world of the miniature, with people and prompts that nothing was trained on; or with --people-dir on
    real people, for whoever has the weights. Prints a table; a key of the JSON is a figure and a condition, as in
    likeness_0.5 or adherence_start_4.
    """
    try:
        settings = Settings.from_environment(**_given(preset=preset, miniature_dir=miniature_dir))
        if people_dir is None and settings.preset != "miniature":
            raise SettingsInvalid(f"the preset {settings.preset} draws real people: name a folder with --people-dir.")
        weights, starts = _numbers(id_weights, float), _numbers(start_steps, int)
        subjects, cases = _whom(people_dir, count, seed, prompts, repeats)
        size = _size(settings, width, height)
        results, about = _measured(settings, subjects, cases, (weights, starts, steps, size), (judge, clip))
    except PipelineError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except OSError as error:  # a file that an option names
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(1) from error
    _tell(results, {"preset": settings.preset, "seed": seed, **about}, json, plots)


def _whom(
    people_dir: Path | None, count: int, seed: int, prompts: Path | None, repeats: int
) -> "tuple[list[Subject], list[Case]]":
    from pipeline.evaluation import people

    if people_dir is None:
        return people.drawn(count, seed)
    lines = people.read_prompts(prompts) if prompts else people.read_prompts()
    return people.photographed(people_dir, lines, repeats, seed)


def _measured(
    settings: Settings, subjects: "Sequence[Subject]", cases: "Sequence[Case]", how: tuple[Any, ...], judging: Any
) -> "tuple[Results, dict[str, Any]]":
    """All figures, and how they came about."""
    from pipeline.evaluation import run, studio
    from pipeline.evaluation.painting import Format, conditions

    weights, starts, steps, size = how
    started = time.perf_counter()
    wanted, files = conditions(weights, starts, steps), studio.Files.of(settings, *judging)
    drawn = subjects if subjects[0].person is not None else ()
    painter, judges = studio.load(settings, Format(*size, steps), files, drawn)
    loaded = time.perf_counter()
    results = run.evaluate(subjects, cases, wanted, painter.paint, judges, _progress)
    if drawn:
        results = studio.with_ceiling(results, settings, subjects, cases, judges)
    return results, {
        "people": len(subjects),
        "pictures": len(cases),
        "steps": steps,
        "width": size[0],
        "height": size[1],
        "seconds": {"load": round(loaded - started, 1), "evaluate": round(time.perf_counter() - loaded, 1)},
        "models": dict(sorted({**painter.models, **studio.judged_with(files)}.items())),
        "libraries": studio.versions(),
    }


def _tell(results: "Results", about: dict[str, Any], json: Path | None, plots: Path | None) -> None:
    from pipeline.evaluation import report

    print(report.table(results))
    print(
        f"\n{about['people']} people, {about['pictures']} pictures a column, {about['steps']} steps; "
        f"{about['seconds']['evaluate']:.0f} s. ± is one standard error."
    )
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(report.as_json(results, about))
    if plots is not None:
        for path in report.plots(results, plots):
            print(path)


def _size(settings: Settings, width: int | None, height: int | None) -> tuple[int, int]:
    own = (256, 256) if settings.preset == "miniature" else (896, 1152)
    return width or own[0], height or own[1]


def _numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise SettingsInvalid(f"{text!r} is not a list of numbers parted by commas.") from error


def _given(**options: Any) -> dict[str, Any]:
    return {name: str(value) for name, value in options.items() if value is not None}


def _progress(line: str) -> None:
    print(line, file=sys.stderr)

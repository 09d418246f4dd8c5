"""`pulid evaluate`: how well the pictures keep a face and follow their prompts, in figures with standard errors."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.console import given, told
from pipeline.errors import SettingsInvalid
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.evaluation.painting import Condition, Format
    from pipeline.evaluation.people import Case, Subject
    from pipeline.evaluation.run import Results
    from pipeline.evaluation.studio import JudgeFiles

PEOPLE = 60
MAX_SEED = 2**32 - 1  # as a picture's seed holds the evaluation's times ten thousand
OWN_SIZE = (896, 1152)  # of every preset but the miniature


@dataclass(frozen=True, slots=True)
class Plan:
    """An evaluation as it is asked for, checked before any network is read."""

    settings: Settings
    form: "Format"
    conditions: "tuple[Condition, ...]"
    judges: "JudgeFiles"
    subjects: "Sequence[Subject]"
    cases: "Sequence[Case]"


def evaluate(  # noqa: PLR0913 - each is an option of the command line
    preset: Annotated[
        str | None, typer.Option(help="The set of models (PULID_PRESET): miniature, flux-dev, ...")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--people", min=1, help=f"How many held-out people of the drawn world; else {PEOPLE}.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Which people, prompts and noise.")] = 0,
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
    repeats: Annotated[
        int | None, typer.Option(min=1, max=100, help="Pictures per person of theirs and prompt; else 1.")
    ] = None,
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
    from pipeline.evaluation.painting import conditions
    from pipeline.evaluation.studio import JudgeFiles

    with told():
        settings = Settings.from_environment(**given(preset=preset, miniature_dir=miniature_dir))
        wanted = conditions(_numbers(id_weights, float), _numbers(start_steps, int), steps)
        subjects, cases = _whom(settings, seed, count, people_dir, **given(prompts=prompts, repeats=repeats))
        form = _format(settings, width, height, steps, cases)
        judges = JudgeFiles.of(settings, judge, clip)
        for folder in given(json=json and json.parent, plots=plots).values():
            folder.mkdir(parents=True, exist_ok=True)  # now, and not when all pictures are made
        results, about = _measured(Plan(settings, form, wanted, judges, subjects, cases))
        _tell(results, {"preset": settings.preset, "seed": seed, **about}, json, plots)


def _whom(
    settings: Settings, seed: int, count: int | None, people_dir: Path | None, **theirs: Any
) -> "tuple[list[Subject], list[Case]]":
    """Whom and what to draw; theirs: prompts and repeats for people_dir, where they are given."""
    from pipeline.evaluation import people

    if people_dir is None:
        if settings.preset != "miniature":
            raise SettingsInvalid(f"the preset {settings.preset} draws real people: name a folder with --people-dir.")
        if theirs:
            raise SettingsInvalid(f"--{next(iter(theirs))} goes with --people-dir: drawn people have a prompt each.")
        return people.drawn(PEOPLE if count is None else count, seed)
    if count is not None:
        raise SettingsInvalid("--people counts drawn people; of --people-dir all are taken.")
    lines = people.read_prompts(theirs.get("prompts", people.PAPER_PROMPTS))
    return people.photographed(people_dir, lines, theirs.get("repeats", 1), seed)


def _format(settings: Settings, width: int | None, height: int | None, steps: int, cases: "Sequence[Case]") -> "Format":
    """What all pictures share; raises InvalidRequest where the service would refuse a case."""
    from deployments.body import validated
    from pipeline.evaluation.painting import Format
    from pipeline.miniature.configs import PICTURE_SIZE

    own = (PICTURE_SIZE, PICTURE_SIZE) if settings.preset == "miniature" else OWN_SIZE
    form = Format(own[0] if width is None else width, own[1] if height is None else height, steps)
    for case in cases:
        validated(form.fields(case))
    return form


def _measured(plan: Plan) -> "tuple[Results, dict[str, Any]]":
    """All figures, and how they came about."""
    from pipeline.evaluation import run, studio

    started = time.perf_counter()
    drawn = plan.subjects if plan.subjects[0].person is not None else ()
    painter, judges = studio.load(plan.settings, plan.form, plan.judges, drawn)
    loaded = time.perf_counter()
    results = run.evaluate(plan.subjects, plan.cases, plan.conditions, painter.paint, judges, _progress)
    if drawn:
        results = studio.with_ceiling(results, plan.settings, plan.subjects, plan.cases, judges)
    return results, {
        "people": len(plan.subjects),
        "pictures": len(plan.cases),
        "steps": plan.form.num_steps,
        "width": plan.form.width,
        "height": plan.form.height,
        "seconds": {"load": round(loaded - started, 1), "evaluate": round(time.perf_counter() - loaded, 1)},
        "models": dict(sorted({**painter.models, **studio.judged_with(plan.judges)}.items())),
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
        json.write_text(report.as_json(results, about))
    if plots is not None:
        for path in report.plots(results, plots):
            print(path)


def _numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise SettingsInvalid(f"{text!r} is not a list of numbers parted by commas.") from error


def _progress(line: str) -> None:
    print(line, file=sys.stderr)

"""`pulid weights`: which model files there are, fetch them, verify them."""

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as Speed

from pipeline import weights
from pipeline.errors import PipelineError
from pipeline.settings import Settings
from pipeline.weights import PRESETS, Finding, ModelSpec, Preset, Source

app = typer.Typer(help="The model files: list, fetch, verify.", no_args_is_help=True)

COLUMNS = ("role", "file", "size", "licence", "commercial use", "state")
PresetOption = Annotated[str | None, typer.Option("--preset", help="One of: " + ", ".join(PRESETS) + ".")]


@app.command("list")
def list_files(preset: PresetOption = None) -> None:
    """Every file of a preset, its licence, and whether it is there."""
    settings = _settings(preset)
    row = PRESETS[settings.preset]
    typer.echo(f"{row.name}: {row.description}. Files in {weights.locate(settings).root}")
    for line in table(_told(weights.findings(settings))):
        typer.echo(line)


@app.command()
def fetch(
    preset: PresetOption = None,
    accept_licences: Annotated[
        bool, typer.Option("--accept-licences", help="You have read and accept the licences of the files.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(envvar="HF_TOKEN", show_envvar=True, help="An access token of huggingface.co, for gated files."),
    ] = None,
    hub: Annotated[str, typer.Option(envvar="HF_ENDPOINT", help="Another server with the hub's layout.")] = weights.HUB,
) -> None:
    """Fetch the files of a preset that are not there yet; a transfer that broke off goes on where it stopped."""
    settings = _settings(preset)
    row = PRESETS[settings.preset]
    if row.shipped:
        typer.echo(f"The preset {row.name} needs no download: its files come with this package.")
        return
    try:
        count = fetch_with_bar(
            settings, row, accept_licences, Source(hub=(hub or weights.HUB).rstrip("/"), token=token or None)
        )
    except PipelineError as error:
        raise _failed(error) from error
    typer.echo(f"{row.name} is complete in {settings.weights_dir.expanduser()}: {count} file(s) fetched.")


@app.command()
def verify(preset: PresetOption = None) -> None:
    """Read every file of a preset and compare it with its known sha256; exits with 1 if one is missing or damaged."""
    settings = _settings(preset)
    row = PRESETS[settings.preset]
    bad = 0
    for finding in _told(weights.findings(settings, read=True)):
        typer.echo(f"{_word(finding):<22}{finding.file}")
        bad += finding.state in ("missing", "corrupt")
    if bad:
        mend = "install this package anew" if row.shipped else f"run `pulid weights fetch --preset {row.name}`"
        typer.echo(f"{bad} file(s) are missing or damaged; {mend}.", err=True)
        raise typer.Exit(1)


def fetch_with_bar(settings: Settings, preset: Preset, accept_licences: bool, source: Source) -> int:
    """Fetch with a progress bar on standard error; returns how many files came. Raises WeightsError."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
                # a line of its own: where output goes to a log, bars show only at the end
                bar.console.print(f"{name} ({_size(total or 0)})", highlight=False, markup=False)
            bar.update(tasks[name], completed=done, total=total)

        return len(weights.fetch(settings, accept_licences, show, source, preset))


def table(findings: Iterable[Finding]) -> list[str]:
    """Findings as lines of text with aligned columns, then the licences' addresses."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    pages: dict[str, None] = {}
    for finding in findings:
        licence = finding.spec.licence
        pages[f"{finding.spec.role}: {licence.name}, {licence.page}"] = None
        use = "yes" if licence.commercial else "no"
        size = _size(finding.size)
        rows.append((finding.spec.role, finding.file, size, _licence(finding.spec), use, _word(finding)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", "Licences", *pages]


def _settings(preset: str | None) -> Settings:
    try:
        return Settings.from_environment() if preset is None else Settings.from_environment(preset=preset)
    except PipelineError as error:
        raise _failed(error) from error


def _told(findings: Iterable[Finding]) -> Iterable[Finding]:
    try:
        yield from findings
    except PipelineError as error:
        raise _failed(error) from error


def _failed(error: PipelineError) -> typer.Exit:
    typer.echo(str(error), err=True)
    return typer.Exit(1)


def _licence(spec: ModelSpec) -> str:
    return spec.licence.name + (", gated" if spec.gated else "")


def _word(finding: Finding) -> str:
    if finding.pinned or finding.spec.repository is None:
        return finding.state
    return f"{finding.state}, not pinned"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B" if count else "?"

"""`make miniature`: the miniature's weights from nothing, stage by stage, two stages side by side where they can be.

Each stage runs in a process of its own. A build that was stopped goes on where it was: `--work` holds what is done.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.training.miniature.plan import Plan

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
WORK = typer.Option(
    help="Datasets, checkpoints and figures: some 5 GB. Else build/miniature, or -quick.", file_okay=False
)
WEIGHTS = typer.Option(
    help="Where the finished files go. Else those of this package; of a quick run, --work.", file_okay=False
)
Quick = Annotated[bool, typer.Option("--quick", help="Every stage, a few steps each: to see that all of it runs.")]
SHIPPED = Path(__file__).parent.parent / "pipeline" / "miniature" / "weights"


@app.command()
def build(
    work: Annotated[Path | None, WORK] = None,
    weights: Annotated[Path | None, WEIGHTS] = None,
    quick: Quick = False,
    jobs: Annotated[int, typer.Option(min=1, help="Stages at one time; the processor's cores are shared out.")] = 2,
) -> None:
    """Run all stages that are not done yet, write the manifest, and print every figure."""
    from pipeline.miniature.files import write_manifest
    from pipeline.training.miniature.build import STAGES, ready, remembered

    work = work or Path("build/miniature-quick" if quick else "build/miniature")
    weights = weights or (work / "weights" if quick else SHIPPED)
    work.mkdir(parents=True, exist_ok=True)
    weights.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    done = set(remembered(work, _plan(quick)))
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[int], str] = {}
        while len(done) < len(STAGES):
            waiting = list(ready(done, set(running.values())))
            alone = len(waiting) + len(running) == 1
            for begun in waiting[: jobs - len(running)]:
                future = pool.submit(_run, begun.name, work, weights, quick, 1 if alone else jobs)
                running[future] = begun.name
                print(f"{time.perf_counter() - started:7.0f} s  {begun.name} begins", flush=True)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finished = running.pop(future)
                if future.result() != 0:
                    log = work / "logs" / f"{finished}.log"
                    print(f"{finished} failed; {log} says why. Run again to go on from there.", file=sys.stderr)
                    if running:
                        print(f"Waiting for {', '.join(running.values())}.", file=sys.stderr, flush=True)
                    raise SystemExit(1)
                done.add(finished)
                print(f"{time.perf_counter() - started:7.0f} s  {finished} is done", flush=True)
    write_manifest(weights)
    _print(remembered(work, _plan(quick)))


@app.command()
def stage(name: str, work: Annotated[Path, WORK], weights: Annotated[Path, WEIGHTS], quick: Quick = False) -> None:
    """Run one stage in this process."""
    from pipeline.training.miniature.build import run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    print(json.dumps(dict(run(name, work, weights, _plan(quick))), indent=1))


def _plan(quick: bool) -> "Plan":
    from pipeline.training.miniature.plan import FULL, QUICK

    return QUICK if quick else FULL


def _run(name: str, work: Path, weights: Path, quick: bool, jobs: int) -> int:
    """Run a stage in a process of its own, with its share of the cores and a log of its own; its exit status."""
    log = work / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "cluster.miniature", "stage", name, "--work", work, "--weights", weights]
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    with log.open("ab") as file:
        return subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def _print(figures: Mapping[str, Mapping[str, float]]) -> None:
    for name, values in figures.items():
        print(name)
        for key, value in values.items():
            print(f"    {key:32} {value:.4g}")


if __name__ == "__main__":
    app()

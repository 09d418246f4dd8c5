"""All benchmarks, one after another, in one process with one thread.

    python -m bench [--only B1,B6] [--device cpu|cuda] [--runs 15] [--json FILE] [--write-docs]

Results go to bench/results.json (bench/results-cuda.json from a GPU), where those of the same machine and versions are
kept beside them; --write-docs renders both files and the plots into docs/benchmarks.md. On a GPU the model is as large
as FLUX, with random weights: nothing is downloaded, and neither Ray nor anything to be installed is needed.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from bench import results
from bench.measure import machine, run_facts
from bench.registry import BENCHMARKS, Run

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
FILES = {"cpu": ROOT / "bench" / "results.json", "cuda": ROOT / "bench" / "results-cuda.json"}
TITLES = {key: benchmark.title for key, benchmark in BENCHMARKS.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="keys, with commas between them; all where none are given")
    parser.add_argument("--device", choices=list(FILES), default="cpu")
    parser.add_argument("--runs", type=int, default=15, help="of every comparison, after two that do not count")
    parser.add_argument("--json", type=Path, help="results.json; those of the same machine in it are kept")
    parser.add_argument("--write-docs", action="store_true", help="renew the tables and plots of docs/benchmarks.md")
    options = parser.parse_args(arguments)
    keys = options.only.split(",") if options.only else list(BENCHMARKS)
    if unknown := [key for key in keys if key not in BENCHMARKS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if options.runs < 2:
        parser.error("--runs must be at least 2: the noise is a spread")
    failed = measure(keys, Run(options.runs, options.device), options.json or FILES[options.device])
    if options.write_docs:
        write_document()
    if failed:
        sys.exit(f"These failed, for the reasons above: {', '.join(failed)}.")


def measure(keys: Sequence[str], run: Run, path: Path) -> list[str]:
    """Run benchmarks; each result is printed and written before the next begins. Gives back the keys that failed."""
    command, failed = f"python -m bench --device {run.device} --runs {run.runs}", []
    for key in keys:
        print(f"{key} {TITLES[key]} ...", file=sys.stderr, flush=True)
        try:
            result = BENCHMARKS[key].measure(run)
        except Exception:  # whatever it is, the others are still measured
            traceback.print_exc()
            failed.append(key)
            continue
        entry = results.as_entry(result, run_facts(command))
        if entry["value"] is None:
            print(f"{key} {TITLES[key]}: not measured: {entry['not_measured']}", flush=True)
            continue  # what a machine with a GPU has measured stays
        found = {results.MACHINE: machine(run.device), key: entry}
        results.write(path, results.merged(results.read(path), found))
        print(results.table(found, {key: TITLES[key]}), flush=True)
    return failed


def write_document() -> None:
    """Both files' results as tables and plots, between the marks of docs/benchmarks.md."""
    from bench import plots

    cpu, cuda = (results.read(path) for path in FILES.values())
    drawn = plots.draw(cpu, DOCUMENT.parent / "images")
    inner = "\n\n".join(
        [
            *("### Without a GPU", results.section(cpu, TITLES) or "Not measured."),
            *(f"![{caption}](images/{name})\n\n{caption}" for name, caption in drawn.items()),
            *("### On a GPU", results.section(cuda, TITLES) or "Not measured: no GPU. `python -m bench --device cuda`"),
        ]
    )
    DOCUMENT.write_text(results.into_document(DOCUMENT.read_text(), inner))


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # two threads and a busy neighbour wait for each other at barriers
        os.execve(sys.executable, [*sys.orig_argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()

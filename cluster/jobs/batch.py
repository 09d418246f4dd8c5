"""Many requests at once: JSONL in, pictures in the store, and one line per request out.

    ray job submit -- python -m cluster.jobs.batch --input requests.jsonl --output results.jsonl

A line of the input is the body of `POST /v1/images`, and line n of the output its answer (n from 0; blank lines do not
count): `{"row", "id", "images", "faces", "prompt_truncated", "timings"}`, or `{"row", "error": {"code", "detail"}}`.
One row's failure is one error row; the job itself fails only where no row could succeed (input, weights, store).

The output is written to `OUTPUT.part` line by line as rows end, in the order of the input, and renamed when it is
complete; on S3 the object appears when it is complete. A job that was stopped is simply started again: rows whose
record is stored already are answered from the store.
"""

import argparse
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import ray
from pyarrow import fs
from ray.data import ActorPoolStrategy, DataContext, Dataset

from cluster.jobs import rows
from cluster.jobs.rows import Line, Work
from cluster.jobs.steps import STEPS, Actor, Maker, Source
from pipeline.errors import PipelineError, SettingsInvalid
from pipeline.settings import Settings
from pipeline.store import open_store

# Of one GPU, for EVA-CLIP, IDFormer and T5 together; the denoiser takes the rest, so one GPU carries the whole way.
ENCODERS_SHARE = 0.3
MAX_BLOCKS = 10_000  # rows are handed out one by one up to here, and in equal portions beyond


@dataclass(frozen=True, slots=True)
class Job:
    """What a run reads and writes, and with how many GPUs and face detectors (None: as many as the cluster has)."""

    input: str
    output: str
    gpus: int | None = None
    detectors: int | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended: pictures in the store, and rows that became none."""

    pictures: int
    errors: int

    def __str__(self) -> str:
        return f"{_count(self.pictures, 'picture')}, {_count(self.errors, 'error')}"


@dataclass(frozen=True, slots=True)
class Pool:
    """Actors that take rows through the same steps: how many at most, and what each of them takes."""

    steps: tuple[str, ...]
    actors: int
    cpus: float
    gpus: float = 0.0


def plan(cluster: Mapping[str, float], job: Job) -> list[Pool]:
    """Which actors take a row through which steps, and with what.

    Every pool starts with one actor, so one of each has to fit into the cluster at once. Without GPUs every model is in
    one process: such a cluster is for the miniature, where loading libraries takes longer than computing.
    Raises SettingsInvalid where the cluster has no CPUs.
    """
    cpus, gpus = cluster.get("CPU", 0.0), int(cluster.get("GPU", 0)) if job.gpus is None else job.gpus
    if gpus < 0 or (job.detectors is not None and job.detectors < 1):
        raise SettingsInvalid("--num-gpus has to be 0 or more, and --detectors 1 or more.")
    if cpus < 1:
        raise SettingsInvalid("The cluster has no CPUs to run on; start a worker node with at least one CPU first.")
    read = Pool(("request",), 1, 0.0)  # on the driver's node, which on KubeRay is the head and offers no CPUs
    detectors = max(1, int(cpus) // 4) if job.detectors is None else job.detectors
    if not gpus:
        return [read, Pool(("faces", "identity", "text", "denoise", "store"), detectors, 1.0)]
    share = min(1.0, cpus / 2)
    return [
        read,
        Pool(("faces",), detectors, share),
        Pool(("identity", "text"), 1, 0.0, ENCODERS_SHARE),
        Pool(("denoise",), gpus, 0.0, 1 - ENCODERS_SHARE),
        Pool(("store",), 1, share),
    ]


def run(job: Job, settings: Settings, makers: Mapping[str, Maker] = STEPS) -> Summary:
    """Every row of the input, through every step, into the output.

    Raises PipelineError where no row could succeed: the input cannot be read, the store refuses.
    """
    settings = _absolute(settings)
    try:
        lines = rows.index(job.input, settings.preset)
    except (OSError, ValueError) as error:  # pyarrow raises ValueError for an address that it does not know
        raise SettingsInvalid(f"--input cannot be read: {error}") from error
    open_store(settings.store).check()  # a store that refuses is told before any GPU is used
    print(f"{_count(len(lines), 'row')} to do", flush=True)
    pictures = errors = 0
    with _output(job.output) as output:
        for done, result in enumerate(_results(job, settings, lines, makers), start=1):
            output.write(json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            pictures += len(result.get("images", ()))
            errors += "error" in result
            if done % max(1, len(lines) // 20) == 0:
                print(f"{done} of {_count(len(lines), 'row')} done", flush=True)
    return Summary(pictures, errors)


def _results(job: Job, settings: Settings, lines: Sequence[Line], makers: Mapping[str, Maker]) -> Iterator[Any]:
    if not lines:
        return
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # a job's log is read as a file
    work = [{"work": pickle.dumps(Work(line))} for line in lines]
    dataset: Dataset = ray.data.from_items(work, override_num_blocks=min(len(work), MAX_BLOCKS))
    for pool in plan(ray.cluster_resources(), job):
        chosen = {name: makers[name] for name in pool.steps}
        dataset = _through(dataset, pool, chosen, Source(settings, job.input))
    for row in dataset.iter_rows():
        yield pickle.loads(row["work"]).result


def _through(dataset: Dataset, pool: Pool, makers: Mapping[str, Maker], source: Source) -> Dataset:
    # A step without a GPU of its own must not take a neighbour's, nor one with a GPU leave it idle because the node on
    # which the job was started has none.
    device = {True: "auto", False: "cpu"}[pool.gpus > 0]
    source = Source(source.settings.model_copy(update={"device": device}), source.input)
    here = None
    if "request" in makers and "://" not in source.input:  # the file is where the job runs
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return dataset.map(
        Actor,
        fn_constructor_args=(makers, source),
        compute=ActorPoolStrategy(min_size=1, max_size=pool.actors),
        num_cpus=None if pool.gpus else pool.cpus,  # Ray Data calls asking for both experimental
        num_gpus=pool.gpus or None,
        label_selector=here,
    )


@contextmanager
def _output(address: str) -> Iterator[IO[bytes]]:
    try:
        filesystem, path = rows.locate(address)
        if not isinstance(filesystem, fs.LocalFileSystem):  # told now, and not when the GPUs' work is done
            filesystem.open_output_stream(f"{path}.part").close()
            filesystem.delete_file(f"{path}.part")
    except (OSError, ValueError) as error:
        raise SettingsInvalid(f"--output cannot be written: {error}") from error
    if isinstance(filesystem, fs.LocalFileSystem):
        try:
            Path(f"{path}.part").touch()
        except OSError as error:
            raise SettingsInvalid(f"--output cannot be written: {error}") from error
        with open(f"{path}.part", "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(f"{path}.part", path)
        return
    with tempfile.TemporaryFile() as stream:  # an object store's stream would be completed even by an error
        yield stream
        stream.seek(0)
        with filesystem.open_output_stream(path) as target:
            shutil.copyfileobj(stream, target)


def _absolute(settings: Settings) -> Settings:
    # Actors have working directories of their own.
    if not settings.store.url.startswith("file://"):
        return settings
    folder = Path(unquote(settings.store.url.removeprefix("file://"))).expanduser().absolute()
    store = settings.store.model_copy(update={"url": folder.as_uri()})
    return settings.model_copy(update={"store": store})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 even where single rows failed, 1 where the job did."""
    parser = argparse.ArgumentParser(prog="python -m cluster.jobs.batch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--input", required=True, help="JSONL, one request per line: a path, or s3://bucket/key of AWS")
    parser.add_argument("--output", required=True, help="JSONL, one result per line: a path, or s3://bucket/key of AWS")
    parser.add_argument("--store", help="where pictures go: file://folder or s3://bucket/prefix (PULID_STORE__URL)")
    parser.add_argument("--preset", help="the set of models (PULID_PRESET)")
    parser.add_argument("--num-gpus", type=int, help="GPUs to use; default: those the cluster has now; 0: none")
    parser.add_argument("--detectors", type=int, help="face detectors at most; default: one per four CPUs")
    given = parser.parse_args(arguments)
    overrides = {"store__url": given.store, "preset": given.preset}
    try:
        settings = Settings.from_environment(**{name: value for name, value in overrides.items() if value is not None})
        summary = run(Job(given.input, given.output, given.num_gpus, given.detectors), settings)
    except PipelineError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Seconds per stage of one request, and what HTTP and Ray add to `pipeline.flow.generate`.

    python -m bench.stages [--runs 15] [--json FILE]

Each run makes the same picture three times, one after another: in this process (A), through HTTP and Ray (B), and in
this process again (A'). Figures are medians over the runs. The noise is A'/A, which would be 1 on an idle machine; a
ratio B/A inside its spread says nothing. What is outside the stages is told apart, as the noise of computing does not
drown it: the whole time less faces, identity, denoise and store (text is ready before the identity).

"""

import argparse
import base64
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.demo import astronaut
from cluster.local import free_port, running
from pipeline import flow
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.store import ImageStore, open_store

STAGES = ("faces", "identity", "text", "denoise", "store")
BODY = {"prompt": "portrait of an astronaut", "width": 512, "height": 512, "num_steps": 8, "seed": 1}


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:  # Ray gives its replicas one; both ways are measured with the same
        os.execve(sys.executable, [*sys.orig_argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory(prefix="pulid-bench-") as folder:
        # without caches, as the same photo and prompt come again
        caches = {"cache__identity_bytes": 0, "cache__prompt_bytes": 0}
        settings = Settings.from_environment({}, preset="miniature", store__url=f"file://{folder}", **caches)
        results = measure(settings, options.runs)
    print(json.dumps(results, indent=1))
    print(table(results), file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Made:
    """One picture: seconds from the caller's side, seconds per stage, and a hash of its bytes."""

    seconds: float
    stages: Mapping[str, float]
    digest: str

    @property
    def outside(self) -> float:
        """Seconds that are no stage's."""
        return self.seconds - sum(self.stages[stage] for stage in ("faces", "identity", "denoise", "store"))


def measure(settings: Settings, runs: int) -> dict[str, Any]:
    """Run both ways in turn, after two runs that do not count."""
    body = {**BODY, "people": [{"photos": [base64.b64encode(astronaut()).decode()]}]}
    request, store = Request.model_validate(body), open_store(settings.store)
    stages = flow.load_stages(settings)
    made = []
    with (
        running(settings, "127.0.0.1", free_port()) as url,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        for _ in range(runs + 2):
            before = in_process(request, stages, store)
            served = over_http(client, body)
            made.append((before, served, in_process(request, stages, store)))
    return summary(made[2:])


def in_process(request: Request, stages: flow.Stages, store: ImageStore) -> Made:
    """One picture without HTTP and Ray."""
    started = time.perf_counter()
    stored = flow.generate(request, stages, store)
    seconds = time.perf_counter() - started
    return Made(seconds, stored.record["timings"], stored.record["pictures"][0]["sha256"])


def over_http(client: httpx.Client, body: dict[str, Any]) -> Made:
    """One picture through the service."""
    started = time.perf_counter()
    answer = client.post("/v1/images", json=body)
    seconds = time.perf_counter() - started
    image = answer.raise_for_status().json()["images"][0]
    data = client.get(image["url"]).raise_for_status().content
    return Made(seconds, answer.json()["timings"], hashlib.sha256(data).hexdigest())


def summary(runs: Sequence[tuple[Made, Made, Made]]) -> dict[str, Any]:
    """Medians, ratios and noise."""
    alone = [made for before, _, after in runs for made in (before, after)]
    served = [made for _, made, _ in runs]
    noise = [after.seconds / before.seconds for before, _, after in runs]
    deciles = statistics.quantiles(noise, n=10)
    return {
        "request": {**BODY, "people": 1, "preset": "miniature"},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        "runs": len(runs),
        "same_pixels": len({made.digest for made in (*alone, *served)}) == 1,
        "in_process": _medians(alone),
        "http_and_ray": _medians(served),
        "ratio": statistics.median(2 * made.seconds / (before.seconds + after.seconds) for before, made, after in runs),
        "a_a_ratio": statistics.median(noise),
        "a_a_spread": [deciles[0], deciles[-1]],
        "overhead_seconds": _medians(served)["outside"] - _medians(alone)["outside"],
    }


def _medians(made: Sequence[Made]) -> dict[str, float]:
    stages = {stage: statistics.median(one.stages[stage] for one in made) for stage in STAGES}
    outside = statistics.median(one.outside for one in made)
    return {**stages, "outside": outside, "total": statistics.median(one.seconds for one in made)}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| stage | in process, s | HTTP and Ray, s |", "|---|---|---|"]
    for stage in (*STAGES, "outside", "total"):
        rows.append(f"| {stage} | {results['in_process'][stage]:.3f} | {results['http_and_ray'][stage]:.3f} |")
    low, high = results["a_a_spread"]
    rows += [
        "",
        f"Ratio {results['ratio']:.3f}; A/A {results['a_a_ratio']:.3f}, from {low:.3f} to {high:.3f} between the first "
        f"and last decile; {results['runs']} runs, same pixels: {results['same_pixels']}.",
        f"Outside the stages HTTP and Ray add {1000 * results['overhead_seconds']:.1f} ms.",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()

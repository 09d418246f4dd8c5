"""Seconds per stage of one request, and what HTTP and Ray add to `pipeline.flow.generate`.

    python -m bench.stages [--runs 15] [--json FILE]

Both ways run in turn in one session, on the same machine, with the same request and seed; figures are medians. The A/A
ratio compares the in-process runs with each other (odd against even ones): a difference smaller than its distance from
1 is noise.
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
from pathlib import Path
from typing import Any

import httpx

from cluster.cli import astronaut
from cluster.local import free_port, running
from pipeline import flow
from pipeline.request import Request
from pipeline.settings import Settings
from pipeline.store import Store, open_store

STAGES = ("faces", "identity", "text", "denoise", "store")
BODY = {"prompt": "portrait of an astronaut", "width": 512, "height": 512, "num_steps": 8, "seed": 1}


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pulid-bench-") as folder:
        settings = Settings.from_environment({}, preset="miniature", store__url=f"file://{folder}")
        results = measure(settings, options.runs)
    print(json.dumps(results, indent=1))
    print(table(results), file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(settings: Settings, runs: int) -> dict[str, Any]:
    """Run both ways in turn, after two runs of each that do not count."""
    body = {**BODY, "people": [{"photos": [base64.b64encode(astronaut()).decode()]}]}
    request, store = Request.model_validate(body), open_store(settings.store)
    stages = flow.load_stages(settings)
    alone: list[tuple[float, dict[str, float]]] = []
    served: list[tuple[float, dict[str, float]]] = []
    pixels = set()
    port = free_port()
    with (
        running(settings, "127.0.0.1", port) as url,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        for run in range(runs + 2):
            for way, results in ((in_process, alone), (over_http, served)):
                seconds, timings, digest = (
                    way(request, stages, store) if way is in_process else way(client, body)  # type: ignore[operator]
                )
                pixels.add(digest)
                if run >= 2:
                    results.append((seconds, timings))
    return summary(alone, served, len(pixels) == 1)


def in_process(request: Request, stages: flow.Stages, store: Store) -> tuple[float, dict[str, float], str]:
    """One picture without Ray: seconds, seconds per stage, and a hash of its bytes."""
    started = time.perf_counter()
    stored = flow.generate(request, stages, store)
    seconds = time.perf_counter() - started
    return seconds, stored.record["timings"], stored.record["pictures"][0]["sha256"]


def over_http(client: httpx.Client, body: dict[str, Any]) -> tuple[float, dict[str, float], str]:
    """One picture through the service, from the client's side."""
    started = time.perf_counter()
    answer = client.post("/v1/images", json=body)
    seconds = time.perf_counter() - started
    answer.raise_for_status()
    data = client.get(answer.json()["images"][0]["url"]).raise_for_status().content
    return seconds, answer.json()["timings"], hashlib.sha256(data).hexdigest()


def summary(
    alone: list[tuple[float, dict[str, float]]], served: list[tuple[float, dict[str, float]]], same_pixels: bool
) -> dict[str, Any]:
    """Medians, ratios and noise."""

    def median(results: list[tuple[float, dict[str, float]]], stage: str | None = None) -> float:
        return statistics.median(seconds if stage is None else timings[stage] for seconds, timings in results)

    return {
        "request": {**BODY, "people": 1, "preset": "miniature"},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        "runs": len(alone),
        "same_pixels": same_pixels,
        "in_process": {"total": median(alone), **{stage: median(alone, stage) for stage in STAGES}},
        "http_and_ray": {"total": median(served), **{stage: median(served, stage) for stage in STAGES}},
        "overhead_seconds": median(served) - median(alone),
        "ratio": median(served) / median(alone),
        "a_a_ratio": median(alone[::2]) / median(alone[1::2]),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| stage | in process, s | HTTP and Ray, s |", "|---|---|---|"]
    for stage in (*STAGES, "total"):
        rows.append(f"| {stage} | {results['in_process'][stage]:.3f} | {results['http_and_ray'][stage]:.3f} |")
    rows.append("")
    rows.append(
        f"HTTP and Ray add {1000 * results['overhead_seconds']:.0f} ms: ratio {results['ratio']:.3f}, "
        f"A/A {results['a_a_ratio']:.3f}, {results['runs']} runs, same pixels: {results['same_pixels']}."
    )
    return "\n".join(rows)


if __name__ == "__main__":
    main()

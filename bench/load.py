"""Open-loop load on a running service: latency, goodput under an SLO, and what was shed or failed.

    python -m bench.load --url http://127.0.0.1:8000 --rate 5 --seconds 60 --slo 2.0 [--body FILE] [--json FILE]

Requests arrive as a Poisson process: the moments are drawn before the first is sent, from a seed, and no arrival waits
for an answer. Latency counts from the moment a request was due, so that neither a slow service nor a late client hides
waiting (coordinated omission). FILE holds one JSON body, or a list of them that is gone through in turn.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.load_report import Sample, report, service_seconds, table

BODY = {"prompt": "portrait of an astronaut", "width": 256, "height": 256, "num_steps": 8, "seed": 1}
PATH = "/v1/images"


def main() -> None:
    """Send the load, and print what it met with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the service, without /v1/images")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals a second, on average")
    parser.add_argument("--seconds", type=float, default=60.0, help="during which requests arrive")
    parser.add_argument("--slo", type=float, default=10.0, help="seconds within which an answer is a good one")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which an answer is given up")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--body", type=Path, help="JSON of a request, or a list of them")
    parser.add_argument("--json", type=Path, help="where the report is written as JSON")
    options = parser.parse_args()
    if min(options.rate, options.seconds, options.slo, options.timeout) <= 0:
        parser.error("--rate, --seconds, --slo and --timeout must be above 0")
    bodies = encoded(json.loads(options.body.read_text()) if options.body else BODY)
    load = Load(options.url.rstrip("/") + PATH, bodies, arrivals(options.rate, options.seconds, options.seed))
    found = report(asyncio.run(send(load, options.timeout)), options.rate, options.seconds, options.slo)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if not found["completed"]:
        sys.exit("No request was answered with a picture; `failures` says why.")


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent where and when: bodies in turn, moments in seconds from the start."""

    url: str
    bodies: Sequence[bytes]
    moments: Sequence[float]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """The moments, in seconds, of a Poisson process: gaps drawn from an exponential distribution of mean 1 / rate."""
    draws, moments, moment = random.Random(seed), [], 0.0
    while (moment := moment + draws.expovariate(rate)) < seconds:
        moments.append(moment)
    return moments


def encoded(bodies: dict[str, Any] | Sequence[dict[str, Any]]) -> list[bytes]:
    """Bodies as bytes, so that the client does nothing but send while it measures."""
    every = [bodies] if isinstance(bodies, dict) else list(bodies)
    return [json.dumps(body).encode() for body in every]


async def send(load: Load, timeout: float) -> list[Sample]:
    """Every request at its moment, whatever became of those before; their samples in the order of arrival."""
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=unlimited, timeout=timeout, trust_env=False) as client:
        started, sent = time.perf_counter(), []
        for number, moment in enumerate(load.moments):
            await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
            body = load.bodies[number % len(load.bodies)]
            sent.append(asyncio.create_task(_one(client, load.url, body, (started, moment))))
        return list(await asyncio.gather(*sent))


async def _one(client: httpx.AsyncClient, url: str, body: bytes, due: tuple[float, float]) -> Sample:
    started, moment = due
    lag = time.perf_counter() - started - moment
    try:
        answer = await client.post(url, content=body, headers={"content-type": "application/json"})
    except httpx.HTTPError as error:
        return Sample(moment, time.perf_counter() - started - moment, lag, 0, type(error).__name__)
    latency = time.perf_counter() - started - moment
    told = _json(answer)
    if answer.status_code != 200:
        retry = "retry-after" in answer.headers
        return Sample(moment, latency, lag, answer.status_code, str(told.get("code", "no code")), retry_after=retry)
    timings = told.get("timings", {})
    return Sample(moment, latency, lag, 200, "", service_seconds(timings), timings.get("queue"))


def _json(answer: httpx.Response) -> dict[str, Any]:
    """The answer's object; empty for what is none, a proxy's page say."""
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    main()

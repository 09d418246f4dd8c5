"""Soak: many jobs from many clients of two tenants, while they cancel and replicas are killed.

    python -m bench.soak --jobs 2000 --clients 32 --cancel 0.1 --kill-every 20 --json out.json

Everything is on this machine, on a Ray cluster of its own, with stages that compute next to nothing. In the end every
job that was accepted must have ended exactly once, and the store must hold nothing else. Exits with 1 where not.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.load_report import percentile
from bench.measure import machine
from bench.soak_clients import Client, Tally
from bench.soak_service import Audit, Replica, alive, audit, kill, megabytes, ongoing, replicas
from bench.soak_stages import soak_parts
from cluster.local import free_port, running
from pipeline.objects_local import LocalObjects
from pipeline.settings import EngineSettings, KeySettings, LimitSettings, Settings, StoreSettings

KINDS = ("Ingress", "FaceDetector", "IdentityEncoder", "TextEncoder", "FluxDenoiser", "Board")
TENANTS = ("acme", "globex")
SETTLING = 60.0  # seconds after the last answer in which the store has to come to rest
SAMPLES = 2.0  # seconds between two looks at memory
STATUS_MILLISECONDS = 100.0  # that the slowest of a hundred status reads may take
GRACE = 5.0  # seconds at most between the moment when a killing is due and the killing
WARM = 20.0  # seconds of a process's life that do not count for its memory
BUSY = {"Board": 1}  # calls that are always open in a replica: each ingress replica waits there for notices


class Chaos:
    """Kills a replica of a random kind every so many seconds, and watches the memory of all."""

    def __init__(self, every: float, seed: int) -> None:
        """`every`: seconds; 0: nothing is killed."""
        self._every, self._random = every, random.Random(seed)
        self.kills: list[tuple[float, str]] = []
        self.memory: dict[Replica, list[tuple[float, float]]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        started = time.monotonic()
        due = started + self._every
        while True:
            await asyncio.sleep(SAMPLES)
            found = await asyncio.to_thread(replicas)
            for replica in found:
                self.memory.setdefault(replica, []).append((time.monotonic() - started, megabytes(replica.pid)))
            if self._every and time.monotonic() >= due:
                due += self._every
                victims = [replica for replica in found if replica.kind in KINDS]
                kind = self._random.choice(sorted({replica.kind for replica in victims}))
                kill(self._random.choice([replica for replica in victims if replica.kind == kind]))
                self.kills.append((round(time.monotonic() - started, 1), kind))

    def growth(self) -> dict[str, dict[str, float]]:
        """Of each kind's longest-lived process: MB after its warm-up, half-way, at its end, and the seconds between."""
        found: dict[str, dict[str, float]] = {}
        for replica, samples in self.memory.items():
            warm = [sample for sample in samples if sample[0] >= samples[0][0] + WARM and sample[1] > 0]
            span = warm[-1][0] - warm[0][0] if warm else 0.0
            if span > found.get(replica.kind, {"seconds": 0.0})["seconds"]:
                found[replica.kind] = {
                    "from": round(warm[0][1], 1),
                    "half": round(warm[len(warm) // 2][1], 1),
                    "to": round(warm[-1][1], 1),
                    "seconds": round(span),
                }
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--cancel", type=float, default=0.1, help="the share of jobs that their callers cancel")
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds; 0: nothing is killed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the report")
    options = parser.parse_args(arguments)
    report = soak(options)
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    sys.exit(0 if report["sound"] else 1)


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """The report of one soak."""
    tally, chaos = Tally(), Chaos(options.kill_every, options.seed)
    with tempfile.TemporaryDirectory(prefix="pulid-soak-") as folder:
        keys = {tenant: f"pulid_{secrets.token_urlsafe(32)}" for tenant in TENANTS}
        settings = _settings(Path(folder), keys)
        with _service(settings) as url:
            started = time.perf_counter()
            asyncio.run(_crowd(url, keys, options, tally, chaos))
            seconds = time.perf_counter() - started
            objects = LocalObjects(Path(folder, "pictures"))
            found, settling = _at_rest(objects, tally)
            busy = _busy()
    return _report(options, tally, chaos, found, {"seconds": seconds, "settling": settling, "ongoing": busy})


async def _crowd(url: str, keys: dict[str, str], options: argparse.Namespace, tally: Tally, chaos: Chaos) -> None:
    numbers = iter(range(options.jobs))
    killing = asyncio.ensure_future(chaos.run())
    limits = httpx.Limits(max_connections=2 * options.clients)
    try:
        sessions = {
            tenant: httpx.AsyncClient(
                base_url=url, timeout=30, trust_env=False, limits=limits, headers={"authorization": f"Bearer {key}"}
            )
            for tenant, key in keys.items()
        }
        tenants = [TENANTS[number % len(TENANTS)] for number in range(options.clients)]
        seeds = random.Random(options.seed)
        clients = [
            Client(sessions[tenant], tenant, tally, options.cancel, seeds.randrange(2**32)) for tenant in tenants
        ]
        await asyncio.gather(*(client.work(numbers) for client in clients))
        for session in sessions.values():
            await session.aclose()
    finally:
        killing.cancel()
        (ended,) = await asyncio.gather(killing, return_exceptions=True)
        if not isinstance(ended, asyncio.CancelledError):
            tally.faults.append(f"the killing of replicas ended by itself: {type(ended).__name__}")


@contextmanager
def _service(settings: Settings) -> Iterator[str]:
    two = {"Ingress": {"num_replicas": 2}}
    with running(settings, "127.0.0.1", free_port(), soak_parts, two) as url:
        yield url


def _settings(folder: Path, keys: dict[str, str]) -> Settings:
    entries = [{"tenant": tenant, "sha256": hashlib.sha256(key.encode()).hexdigest()} for tenant, key in keys.items()]
    file = folder / "keys.json"
    file.write_text(json.dumps(entries))
    file.chmod(0o600)
    return Settings(
        device="cpu",
        weights_dir=folder,
        store=StoreSettings(url=f"file://{folder}/pictures"),
        limits=LimitSettings(max_requests=64),
        engine=EngineSettings(max_jobs=32, preview_steps=4),
        keys=KeySettings(file=file),
    )


def _at_rest(objects: LocalObjects, tally: Tally) -> tuple[Audit, float]:
    """What is wrong in the store, once nothing changes any more, and how many seconds that took."""
    started = time.perf_counter()
    while True:
        found = audit(objects, tally.accepted)
        seconds = time.perf_counter() - started
        if found.clean or seconds > SETTLING:
            return found, seconds
        time.sleep(0.5)


def _busy() -> dict[str, int]:
    """Calls that Serve still counts, by kind, once those that are always open are taken away."""
    deadline = time.monotonic() + SETTLING
    while True:
        found = [replica for replica in replicas() if alive(replica.pid)]
        ingresses = sum(replica.kind == "Ingress" for replica in found)
        counts = {replica.kind: 0 for replica in found}
        for replica in found:
            counts[replica.kind] += ongoing(replica)
        left = {kind: count - BUSY.get(kind, 0) * ingresses for kind, count in counts.items()}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def _report(
    options: argparse.Namespace, tally: Tally, chaos: Chaos, found: Audit, facts: dict[str, Any]
) -> dict[str, Any]:
    milliseconds = {
        name: {f"p{share}": round(1e3 * percentile(values, share), 1) for share in (50, 95, 99)} | {"n": len(values)}
        for name, values in (("status read", tally.reads), ("submit", tally.submits), ("job", tally.jobs))
        if values
    }
    strange = sum(count for status, count in tally.foreign.items() if status != 404)
    ended = sum(tally.ends.values())
    sound = found.clean and not tally.faults and not strange and ended == len(tally.accepted) == options.jobs
    killed = not options.kill_every or len(chaos.kills) >= (facts["seconds"] - GRACE) // options.kill_every
    quick = bool(tally.reads) and milliseconds["status read"]["p99"] <= STATUS_MILLISECONDS
    return {
        "sound": sound and killed and not any(facts["ongoing"].values()),
        "met": {"killed as often as asked": killed, f"status read: p99 <= {STATUS_MILLISECONDS:g} ms": quick},
        "machine": machine("cpu"),
        "jobs": options.jobs,
        "accepted": len(tally.accepted),
        "ends": dict(tally.ends),
        "attempts": {str(number): count for number, count in sorted(tally.attempts.items())},
        "lost": found.lost,
        "doubled": found.doubled,
        "stray": found.stray,
        "faults": tally.faults,
        "asked for others' jobs": {str(status): count for status, count in tally.foreign.items()},
        "calls sent again": {str(status): count for status, count in tally.retried.items()},
        "milliseconds": milliseconds,
        "kills": chaos.kills,
        "memory in MB": chaos.growth(),
        "load average": os.getloadavg()[0],
        **facts,
    }


if __name__ == "__main__":
    main()

"""Clients of the soak: each sends jobs of its tenant one after another, and believes nothing that it is told."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.soak_stages import pixels

PATH = "/v1/images"
PHOTO = "YSBmYWNl"
PATIENCE = 300.0  # seconds until a job that has not ended counts as lost
SPREAD = 0.5  # of what Retry-After asks for, up to which a client waits longer, as clients do not keep step
PAUSE = 0.2  # seconds before a refused or broken call is tried again
WATCHED = 0.1  # the share of jobs whose events are read in the place of polling


@dataclass(slots=True)
class Tally:
    """What the clients saw.

    accepted: tenant by job. reads: seconds of each status read until it was answered. retried: calls that had to be
    sent again, by status (0: broken connections). foreign: answers about other tenants' jobs, by status.
    """

    accepted: dict[str, str] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    reads: list[float] = field(default_factory=list)
    submits: list[float] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)
    retried: Counter[int] = field(default_factory=Counter)
    foreign: Counter[int] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Client:
    """One client of one tenant's; `http` sends its key."""

    def __init__(self, http: httpx.AsyncClient, tenant: str, tally: Tally, cancel: float, seed: int) -> None:
        self._http, self._tenant, self._tally = http, tenant, tally
        self._cancel, self._random = cancel, random.Random(seed)

    async def work(self, numbers: Iterator[int]) -> None:
        """Jobs, as long as there are numbers left."""
        await asyncio.sleep(self._random.random())  # or all clients would keep step
        for number in numbers:
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._job(number)
            except Exception as error:  # whatever it is, the others go on, and the report has it
                self._tally.faults.append(f"job {number}: {type(error).__name__}: {error}")

    async def _job(self, number: int) -> None:
        body = {
            "prompt": f"{self._tenant} {number}",
            "width": 256,
            "height": 256,
            "seed": number,
            "num_steps": self._random.randint(4, 12),
            "people": [{"photos": [PHOTO]}],
        }
        headers = {"prefer": "respond-async", "idempotency-key": f"soak-{number}"}
        began = time.perf_counter()
        accepted = await self._sent("POST", PATH, json=body, headers=headers)
        self._tally.submits.append(time.perf_counter() - began)
        if accepted.status_code not in (200, 202):
            raise ValueError(f"{accepted.status_code} {accepted.text[:200]}")
        job_id = accepted.json()["id"]
        self._tally.accepted[job_id] = self._tenant
        stopped = self._random.random() < self._cancel
        if stopped:
            await asyncio.sleep(self._random.random())
            await self._sent("POST", f"{PATH}/{job_id}/cancel")
        await self._pry()
        if self._random.random() < WATCHED:
            await self._watched(job_id)
        view = await self._ended(job_id, float(accepted.headers.get("retry-after", 0)))
        self._tally.jobs.append(time.perf_counter() - began)
        self._tally.ends[view["status"]] += 1
        self._tally.attempts[view["attempt"]] += 1
        await self._checked(view, body, stopped)

    async def _checked(self, view: Mapping[str, Any], body: Mapping[str, Any], stopped: bool) -> None:
        status = view["status"]
        if status == "failed" or (status == "cancelled" and not stopped):
            self._tally.faults.append(f"{view['id']} {status}: {(view['error'] or {}).get('code')}")
        if status == "succeeded":
            picture = await self._sent("GET", view["images"][0]["url"])
            if picture.content != pixels(body["prompt"], body["seed"]):
                self._tally.faults.append(f"{view['id']}: another picture, {picture.status_code}")

    async def _ended(self, job_id: str, pause: float) -> dict[str, Any]:
        """Read a job until it has ended, as often as its answer's Retry-After, in seconds, allows."""
        while True:
            began = time.perf_counter()
            answer = await self._sent("GET", f"{PATH}/{job_id}", reads=True)
            if answer.status_code != 200:
                raise ValueError(f"{job_id}: {answer.status_code} {answer.text[:200]}")
            view: dict[str, Any] = answer.json()
            if view["id"] != job_id:
                raise ValueError(f"{job_id}: the answer is about {view['id']}")
            if view["status"] not in ("queued", "running"):
                return view
            due = began + pause * self._random.uniform(1.0, 1.0 + SPREAD)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def _watched(self, job_id: str) -> None:
        """Read a job's events to their end, coming back where the stream breaks off."""
        last = ""
        while True:
            try:
                async with self._http.stream("GET", f"{PATH}/{job_id}/events", headers={"last-event-id": last}) as s:
                    name = ""
                    async for line in s.aiter_lines():
                        if line.startswith("id: "):
                            last = line[4:]
                        elif line.startswith("event: "):
                            name = line[7:]
                        if not line and name in ("succeeded", "failed", "cancelled"):
                            return
                    if s.status_code == 404:
                        raise ValueError(f"{job_id}: 404 of its events")
            except httpx.HTTPError:
                self._tally.retried[0] += 1
            await asyncio.sleep(PAUSE)

    async def _pry(self) -> None:
        """Ask for a job of the other tenant's: there has to be none."""
        others = [job_id for job_id, tenant in list(self._tally.accepted.items())[-64:] if tenant != self._tenant]
        if others:
            address = f"{PATH}/{self._random.choice(others)}"
            method, end = self._random.choice([("GET", ""), ("GET", "/0"), ("GET", "/events"), ("POST", "/cancel")])
            answer = await self._sent(method, address + end)
            self._tally.foreign[answer.status_code] += 1

    async def _sent(self, method: str, path: str, reads: bool = False, **options: Any) -> httpx.Response:
        """One call, again where a replica was lost under it."""
        began = time.perf_counter()  # the caller's own wait, calls that had to be sent again included
        while True:
            try:
                answer = await self._http.request(method, path, **options)
            except httpx.HTTPError:
                self._tally.retried[0] += 1
            else:
                if answer.status_code < 500 and answer.status_code != 429:
                    if reads:
                        self._tally.reads.append(time.perf_counter() - began)
                    return answer
                self._tally.retried[answer.status_code] += 1
            await asyncio.sleep(PAUSE)

"""Glance: how far the jobs are that other replicas run, asked of the board now and then, however many ask here."""

import asyncio
import math
import time
from collections.abc import Mapping
from contextlib import suppress

from deployments.board import Step
from deployments.reporter import BoardClient
from pipeline.jobs import Job

FRESH_SECONDS = 0.25  # for which an answer of the board serves everybody
GLANCE_SECONDS = 0.05  # for the board to answer; else the job's last heartbeat tells


class Glance:
    """The board's latest steps, as one ingress replica knows them."""

    def __init__(self, board: BoardClient, fresh: float = FRESH_SECONDS, glance: float = GLANCE_SECONDS) -> None:
        self._board, self._fresh, self._glance = board, fresh, glance
        self._steps: Mapping[str, Step] = {}
        self._asked = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def progress(self, job: Job) -> tuple[int, int] | None:
        """Steps done and in all of the attempt that a job is in; None where the board does not say so at once."""
        if self._asking is None and time.monotonic() >= self._asked + self._fresh:
            self._asked = time.monotonic()
            self._asking = asyncio.ensure_future(self._ask())
        left = self._asked + self._glance - time.monotonic()
        if self._asking is not None and left > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await asyncio.shield(self._asking)
        step = self._steps.get(job.id)
        return (step.done, step.total) if step is not None and step.attempt == job.attempt else None

    async def _ask(self) -> None:
        try:
            self._steps = await self._board.steps()
        except Exception:  # whatever keeps the board away: what it said last may be long past
            self._steps = {}
        finally:
            self._asking = None

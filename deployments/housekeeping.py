"""Housekeeping: what nobody asks for any more is erased. Every ingress replica does it; doing it twice does no harm."""

import asyncio
import logging
from collections.abc import Callable

from deployments.problems import unforeseen
from deployments.worker import stopped
from pipeline.errors import StoreError

log = logging.getLogger(__name__)
SECONDS = 600.0  # between two rounds


class Housekeeping:
    """Sweeps, one after the other, round after round."""

    def __init__(self, *sweeps: Callable[[], int]) -> None:
        """Each sweep blocks, returns how much it erased, and raises StoreError."""
        self._sweeps = sweeps
        self._rounds: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin the rounds."""
        self._rounds = [asyncio.ensure_future(self._go_round())]

    async def close(self) -> None:
        """End the rounds."""
        await stopped(*self._rounds)

    async def _go_round(self) -> None:
        while True:
            await asyncio.sleep(SECONDS)
            for sweep in self._sweeps:
                try:
                    erased = await asyncio.to_thread(sweep)
                except StoreError as error:
                    log.warning("housekeeping could not be done: %s", error.code)
                except Exception as error:  # the next round, and the other sweeps, are to come all the same
                    unforeseen(error, "housekeeping")
                else:
                    log.info("housekeeping erased %d objects", erased)

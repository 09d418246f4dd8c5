"""Limits: how much of the service one API key may take. Each ingress replica counts for itself."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.keys import Caller
from pipeline.errors import RateLimited

MINUTE = 60.0  # seconds
WAITS = 8  # streams and waiting requests that every tenant may have open
WEIGHT = 0.2  # of the newest request in the mean of how long they take


class Limits:
    """What keys have taken; for one event loop."""

    def __init__(self, usual_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`usual_seconds` is how long a request takes in the making, until some have been seen."""
        self._clock, self._usual = clock, usual_seconds
        self._left: dict[str, tuple[float, float]] = {}  # by key: tokens, and when that was so
        self._making: dict[str, list[float]] = {}  # by tenant: when each began, the oldest first

    def spend(self, caller: Caller) -> None:
        """Count one request; raises RateLimited with the seconds after which the next one is let in.

        A token bucket that holds a minute's worth: after a pause, a whole minute's requests may come at once.
        """
        most = caller.requests_per_minute
        if most is None:
            return
        now = self._clock()
        tokens, then = self._left.get(caller.key, (float(most), now))
        tokens = min(float(most), tokens + (now - then) * most / MINUTE)
        self._left[caller.key] = (tokens, now)
        if tokens < 1 - 1e-9:
            wait = (1 - tokens) * MINUTE / most
            raise _limited(f"This API key may send {most} requests a minute", wait)
        self._left[caller.key] = (tokens - 1, now)

    @contextmanager
    def admitted(self, caller: Caller, open_jobs: int = 0) -> Iterator[None]:
        """A place among the tenant's requests in the making while it lasts; raises RateLimited where none is free.

        `open_jobs` are jobs of the tenant that are queued or run without a request in here. A tenant's keys share the
        count, as they share the jobs.
        """
        making, most = self._making.get(caller.tenant, []), caller.max_jobs
        now = self._clock()
        if most is not None and len(making) + open_jobs >= most:
            oldest = now - making[0] if making else 0.0
            raise _limited(f"This API key may have {most} requests or jobs in the making", self._usual - oldest)
        self._making.setdefault(caller.tenant, []).append(now)
        try:
            yield
            self._usual += WEIGHT * (self._clock() - now - self._usual)  # only of those that came to their end
        finally:
            making = self._making[caller.tenant]
            making.remove(now)
            if not making:
                del self._making[caller.tenant]

    def check_waiting(self, caller: Caller, waiting: int, most: int) -> None:
        """Whether one more of a tenant's may wait beside `waiting`; raises RateLimited.

        As many as it may have jobs, but always some; at most `most`. Nobody in particular has no bound of their own.
        """
        allowed = min(most, max(WAITS, caller.max_jobs or most))
        if caller.key and waiting >= allowed:
            raise _limited(f"This API key may have {allowed} streams and waiting requests open", self._usual)


def _limited(what: str, wait: float) -> RateLimited:
    """`wait` in seconds."""
    error = RateLimited(f"{what}, and has used that up; try again after the time in Retry-After.")
    error.retry_after = max(1, math.ceil(wait - 1e-9))
    return error

"""Admission: what one replica does at once: requests in the making, whose bodies take memory, and callers who wait."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.keys import Caller
from deployments.limits import Limits
from pipeline.errors import Overloaded

WAITING = 4  # times as many callers may wait as requests be in the making: a stream lasts long, and costs little
FULL = "The service has all the work it can take; try again after the time in Retry-After."


class Admission:
    """Places for requests in the making and for callers who wait: everybody's, and each key's."""

    def __init__(self, most: int, limits: Limits, open_jobs: Callable[[str], int]) -> None:
        """`most` requests in the making; `open_jobs(tenant)`: work of theirs that goes on without a request."""
        self._free, self._limits, self._open_jobs = most, limits, open_jobs
        self._most_waiting, self._waiting = WAITING * most, Counter[str]()

    @contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """A place while it lasts; raises Overloaded, RateLimited where none is free."""
        if not self._free:
            raise Overloaded(FULL)
        self._free -= 1
        try:
            with self._limits.admitted(caller, self._open_jobs(caller.tenant)):
                yield
        finally:
            self._free += 1

    @contextmanager
    def waiting(self, caller: Caller) -> Iterator[None]:
        """A place for a stream of events, or for waiting until a job ends; raises Overloaded, RateLimited.

        Whoever has a key leaves half of the places to others, so that reads and other tenants are always served.
        """
        self._limits.check_waiting(caller, self._waiting[caller.tenant], self._most_waiting // 2)
        if self._waiting.total() >= self._most_waiting:
            raise Overloaded(FULL)
        self._waiting[caller.tenant] += 1
        try:
            yield
        finally:
            self._waiting[caller.tenant] -= 1
            if not self._waiting[caller.tenant]:
                del self._waiting[caller.tenant]

"""Admission: how many requests one replica has in the making at once, and so what their bodies take of the memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.keys import Caller
from deployments.limits import Limits
from pipeline.errors import Overloaded


class Admission:
    """Places for requests in the making: everybody's, and each key's."""

    def __init__(self, most: int, limits: Limits, open_jobs: Callable[[str], int]) -> None:
        """`open_jobs(tenant)`: work of theirs that goes on without a request."""
        self._free, self._limits, self._open_jobs = most, limits, open_jobs

    @contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """A place while it lasts; raises Overloaded, RateLimited where none is free."""
        if not self._free:
            raise Overloaded("The service has all the work it can take; try again after the time in Retry-After.")
        self._free -= 1
        try:
            with self._limits.admitted(caller, self._open_jobs(caller.tenant)):
                yield
        finally:
            self._free += 1

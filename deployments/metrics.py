"""What caches and engine of a replica did, as metrics of Ray: Prometheus finds them where it finds Ray's own."""

from typing import Any

from ray.serve.metrics import Counter, Gauge

from pipeline.caches import Cache, CacheStats
from pipeline.engine import Engine


class CacheCounters:
    """pulid_cache_hits, pulid_cache_misses and pulid_cache_evictions of one cache, by its name in the tag `cache`.

    Serve adds deployment, replica and application.
    """

    def __init__(self, name: str, cache: Cache[Any]) -> None:
        self._cache, self._tags = cache, {"cache": name}
        self._told = CacheStats(0, 0, 0, 0, 0)
        self._counters = {
            kind: Counter(f"pulid_cache_{kind}", description, ("cache",))
            for kind, description in (
                ("hits", "Values given without computing."),
                ("misses", "Computations."),
                ("evictions", "Values dropped for want of room."),
            )
        }

    def tell(self) -> None:
        """Count what happened since the last time; to be called from one thread."""
        stats = self._cache.stats()
        for kind, counter in self._counters.items():
            more = getattr(stats, kind) - getattr(self._told, kind)
            if more > 0:  # Ray refuses to add 0
                counter.inc(more, self._tags)
        self._told = stats


class EngineGauges:
    """pulid_engine_pictures by state (waiting, running, drawn), and counters pulid_engine_steps, _rows, _done, ..."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._told = engine.stats()
        self._pictures = Gauge("pulid_engine_pictures", "Pictures in the engine now.", ("state",))
        self._counters = {
            name: Counter(f"pulid_engine_{name}", description)
            for name, description in (
                ("steps", "Steps of the engine."),
                ("rows", "Rows in them: more than steps where pictures shared a pass."),
                ("done", "Finished pictures."),
                ("failed", "Pictures that failed."),
                ("cancelled", "Pictures whose callers went away."),
                ("previews_failed", "Previews that could not be made; their pictures went on."),
            )
        }

    def tell(self) -> None:
        """Count what happened since the last time; to be called from one thread."""
        stats = self._engine.stats()
        for state in ("waiting", "running", "drawn"):
            self._pictures.set(getattr(stats, state), {"state": state})
        for name, counter in self._counters.items():
            more = getattr(stats, name) - getattr(self._told, name)
            if more > 0:  # Ray refuses to add 0
                counter.inc(more)
        self._told = stats

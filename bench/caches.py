"""B4 and B5: what is saved where a photo or a prompt was seen before, on the miniature's real networks."""

import base64
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.measure import Part, Result, at_most, exactly, interleaved
from bench.registry import Run
from cluster.demo import astronaut
from pipeline.face_models import load_models
from pipeline.faces import FaceDetector
from pipeline.identity import Identity, IdentityEncoder
from pipeline.request import Person, Photo
from pipeline.settings import Settings
from pipeline.text import TextEncoder

if TYPE_CHECKING:
    from torch import nn

AT_ONCE = 16
PROMPT = "portrait of a smiling woman in a red beanie, color"


class Counter:
    """How often networks were run."""

    def __init__(self) -> None:
        self.calls = 0

    def hook(self, *networks: "nn.Module") -> None:
        """Count the forward passes of torch's networks."""
        for network in networks:
            network.register_forward_hook(self._count)

    def wrap(self, network: Any) -> "Counted":
        """A face network that counts."""
        return Counted(network, self)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def during(self, call: Callable[[], object]) -> int:
        """How many of them one call takes."""
        before = self.calls
        call()
        return self.calls - before


class Counted:
    """A face network, whichever of the three it is."""

    def __init__(self, network: Any, counter: Counter) -> None:
        self._network, self._counter = network, counter

    def find(self, rgb: Any) -> Any:
        """See pipeline.face_models.Finder."""
        self._counter.calls += 1
        return self._network.find(rgb)

    def embed(self, crop: Any) -> Any:
        """See pipeline.face_models.Recogniser."""
        self._counter.calls += 1
        return self._network.embed(crop)

    def labels(self, aligned: Any) -> Any:
        """See pipeline.face_models.Parser."""
        self._counter.calls += 1
        return self._network.labels(aligned)


def identity_cache(run: Run) -> Result:
    """Photo to identity, seen before over not seen; every miss is a tenant's first, so that its caches know nothing."""
    counter, settings = Counter(), Settings.from_environment({}, preset="miniature", device=run.device)
    models = load_models(settings)
    counted = {part: counter.wrap(getattr(models, part)) for part in ("detector", "recogniser", "parser")}
    detector, encoder = FaceDetector.load(settings, replace(models, **counted)), IdentityEncoder.load(settings)
    counter.hook(encoder._eva_clip, encoder._idformer)
    person, tenants = Person(photos=(Photo(base64=base64.b64encode(astronaut()).decode()),)), itertools.count()

    def identify(tenant: str) -> Identity:
        return encoder.encode(detector.detect(person, 0, tenant), "mean", tenant)

    def miss() -> Identity:
        return identify(f"tenant {next(tenants)}")

    whole, expected = counter.during(miss), miss()
    identify("known")
    found = interleaved(miss, lambda: identify("known"), run.runs)
    many = counter.during(lambda: at_once(lambda: identify("newcomer")))
    return Result(
        parts=(
            Part("hit / miss", found.ratio, at_most(1 / 20)),
            Part("networks run on a hit", counter.during(lambda: identify("known")), exactly(0)),
            Part(f"computations of {AT_ONCE} misses at once", many / whole, exactly(1)),
            Part("largest difference of the tokens", _difference(identify("known"), expected), exactly(0)),
        ),
        noise=found.noise,
        method="seconds from a PNG of 512 x 512 in base64 to its identity, seen before over not seen; miniature.",
        details={"miss": found.a, "hit": found.b, "networks run on a miss": whole},
    )


def _difference(one: Identity, other: Identity) -> float:
    return float(np.abs(one.tokens - other.tokens).max())


def prompt_cache(run: Run) -> Result:
    """A prompt read before over one that was not; every miss is another prompt."""
    settings = Settings.from_environment({}, preset="miniature", device=run.device)
    encoder, counter, numbers = TextEncoder.load(settings), Counter(), itertools.count()
    counter.hook(encoder._t5, encoder._clip)
    fresh = TextEncoder.load(settings).encode(PROMPT, 128)
    whole = counter.during(lambda: encoder.encode(PROMPT, 128))
    found = interleaved(
        lambda: encoder.encode(f"{PROMPT}, number {next(numbers)}", 128), lambda: encoder.encode(PROMPT, 128), run.runs
    )
    calls = counter.during(lambda: encoder.encode(PROMPT, 128))
    kept = encoder.encode(PROMPT, 128)
    differences = [np.abs(kept.tokens - fresh.tokens).max(), np.abs(kept.pooled - fresh.pooled).max()]
    many = counter.during(lambda: at_once(lambda: encoder.encode("another prompt", 128)))
    return Result(
        parts=(
            Part("encoders run on a hit", calls, exactly(0)),
            Part(f"computations of {AT_ONCE} misses at once", many / whole, exactly(1)),
            Part("largest difference to a fresh text", float(max(differences)), exactly(0)),
        ),
        noise=found.noise,
        method="a prompt through T5 and CLIP, and from the cache; miniature.",
        details={"miss": found.a, "hit": found.b, "hit / miss": found.ratio, "encoders run on a miss": whole},
    )


def at_once(call: Callable[[], object]) -> None:
    """Make a call in 16 threads that begin together."""
    start = threading.Barrier(AT_ONCE)

    def one(_: int) -> None:
        start.wait()
        call()

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(one, range(AT_ONCE)))

"""All benchmarks: what each is called, what it should reach, and where it runs."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from bench.measure import NO_GPU, Result

BOTH = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Run:
    """How a benchmark is run: its number of runs (a median needs 15), and the device."""

    runs: int
    device: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A function of a module of bench/, imported only when it is run: a GPU machine needs no Ray."""

    title: str
    module: str
    function: str
    devices: tuple[str, ...] = BOTH

    def measure(self, run: Run) -> Result:
        """Run it; a Result without parts where it cannot be."""
        if run.device not in self.devices:
            return Result(reason=f"is measured on {' and '.join(self.devices)} only")
        if run.device == "cuda" and not has_gpu():
            return Result(reason=NO_GPU)
        result: Result = getattr(importlib.import_module(f"bench.{self.module}"), self.function)(run)
        return result


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU here."""
    import torch

    return torch.cuda.is_available()


BENCHMARKS: Mapping[str, Benchmark] = {
    "B1": Benchmark("cross-attention, plain / folded", "adapter", "folding"),
    "B2": Benchmark("step with one identity / without", "adapter", "identity_overhead"),
    "B4": Benchmark("identity cache", "caches", "identity_cache", ("cpu",)),
    "B5": Benchmark("prompt cache", "caches", "prompt_cache", ("cpu",)),
    "B6": Benchmark("batch gain, engine / bare model", "batching", "batch_gain"),
    "B7": Benchmark("batching by the rule / best of always and never", "batching", "batch_rule"),
    "B8": Benchmark("4-step job behind a 28-step one, step-level / request-level", "fairness", "short_behind_long"),
    "B9": Benchmark("engine's overhead per step", "overhead", "engine_overhead"),
    "B10": Benchmark("HTTP and Ray over in-process, no-op stages", "service", "http_overhead", ("cpu",)),
    "B12": Benchmark("goodput at twice the capacity / at 0.9 of it", "service", "overload", ("cpu",)),
    "B13": Benchmark("compile stability over 20 varied requests", "compilation", "stability"),
    "B14": Benchmark("resident weights at FLUX's true configuration", "memory", "resident_weights"),
    "B15": Benchmark("cancel", "fairness", "cancelling"),
}

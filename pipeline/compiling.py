"""torch.compile of a FLUX with identities: what is compiled, what that depends on, and how long it has taken."""

import inspect
import os
import shutil
import time
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pipeline.models.flux import IdentityFlux
from pipeline.models.folding import folded_attention
from pipeline.models.modulation import TableSlice, view_of, with_norms

# Graphs of one function. torch's own limit of 8 is soon reached: `regional` has 16 of three functions when it is warmed
# up (tests/test_acceleration.py). `whole` may want more than this, and then draws without a graph.
GRAPHS = 64


def has_compiler() -> bool:
    """Whether this machine has the C compiler that Triton and inductor call."""
    return (shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")) is not None


def compile_flux(flux: IdentityFlux, mode: Literal["regional", "whole"], backend: str = "inductor") -> None:
    """Compile FLUX in place with torch.compile: `regional`, its blocks one by one, or `whole`, for fixed sizes.

    Regional: one graph serves all blocks of a kind, and the second picture size makes it one for any size. Whole: one
    graph for each size, text length, number of rows and who stands in which row, each compiled for minutes at its first
    use, and the cross-attentions with it. The transformer that FLUX was made from is not changed.
    """
    clock.listen()
    # not fullgraph: beyond the limit of graphs that makes a request fail, which is to be drawn more slowly
    options: dict[str, Any] = {"backend": backend, **_limit()}
    if mode == "whole":
        flux.transformer.compile(dynamic=False, **options)
        return
    attend = torch.compile(folded_attention, **options)
    for wrapped in (*flux.transformer.transformer_blocks, *flux.transformer.single_transformer_blocks):
        reads_table = any(isinstance(module, TableSlice) for module in wrapped.block.modules())
        outer = OwnRow(wrapped.block) if reads_table else None
        block = view_of(wrapped.block) if outer is None else outer.block
        block.compile(**options)
        wrapped.block = block if outer is None else outer
        wrapped.attend = attend


def _limit() -> dict[str, int]:
    """GRAPHS as an argument of torch.compile; before torch 2.12, which has none, as a setting of the process.

    A setting would not do with later ones: there each thread has its own, and it is not the loading thread that draws.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": GRAPHS}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    return {}


class CompilerClock:
    """When torch.compile has worked in this process, in whatever thread."""

    def __init__(self) -> None:
        self._begun = 0
        self._ended: float | None = None  # None: it works now, or never has

    @property
    def begun(self) -> int:
        """How often it has begun: a pass during which this changes tells nothing of how long passes take."""
        return self._begun

    def idle_seconds(self) -> float:
        """Seconds since it last worked: 0 while it does, infinity before it ever has."""
        ended = self._ended  # read once: another thread may compile
        if ended is None:
            return 0.0 if self._begun else float("inf")
        return time.monotonic() - ended

    def listen(self) -> None:
        """Hear of it from now on; any number of times."""
        from torch._dynamo.callback import callback_handler

        if self._start not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def _start(self, _: object) -> None:
        self._ended = None
        self._begun += 1

    def _end(self, _: object) -> None:
        self._ended = time.monotonic()


clock = CompilerClock()  # one, as the compiler's callbacks are the process's


class OwnRow(nn.Module):
    """A block that reads a table of modulations, and is handed its own part of the row only.

    Where its part begins is a number that differs from block to block, and compiled along it would make a graph for
    each; inside, all blocks of a kind are now alike.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        slices = [module for module in block.modules() if isinstance(module, TableSlice)]
        self.start = min(part.start for part in slices)
        self.stop = max(part.stop for part in slices)
        self.block = with_norms(block, lambda norm: view_of(norm, linear=self._moved(norm)))

    def _moved(self, norm: nn.Module) -> TableSlice:
        part = cast(TableSlice, norm.linear)
        return TableSlice(part.start - self.start, part.stop - self.start)

    def forward(self, image: Tensor, text: Tensor, row: Tensor, *others: Any) -> Any:
        """The block's own; row: the whole one (B, W). As IdentityBlock calls it, by position."""
        return self.block(image, text, row[:, self.start : self.stop], *others)

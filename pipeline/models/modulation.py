"""Modulation: what time, guidance and pooled prompt do to FLUX's norms, computed once per picture.

They are known before the first step, and FLUX passes their embedding only from norm to norm. So every norm's shift,
scale and gate for every step can be a table, whose row stands in for the embedding. At FLUX.1's sizes the weights that
make the table are 3.25 of 11.90 billion parameters, and nothing else needs them.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
NORMS = ("norm1", "norm1_context", "norm")  # of a double block the first two, of a single block the last


class Modulation:
    """The table of a transformer whose blocks have not been touched."""

    def __init__(self, transformer: FluxTransformer2DModel, host: bool = False) -> None:
        """With `host` the weights move to the CPU (pinned where there is a GPU) and are lent for a table."""
        self._embed = transformer.time_text_embed
        self._dtype = transformer.x_embedder.weight.dtype
        self._linears = [norm.linear for norm in modulated_norms(transformer)]
        self._device = transformer.x_embedder.weight.device  # its own weights may be in host memory already
        if host:
            for module in (self._embed, *self._linears):
                _to_host(module)

    @torch.inference_mode()
    def table(self, times: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """One row of all modulations for each time: (S, W), W the outputs of all norms' linear layers side by side.

        times (S,) in 0..1; guidance (1,) or None; pooled (1, 768).
        """
        # the model's own order: rounded first, then scaled
        inputs = [times.to(self._dtype) * 1000]
        if guidance is not None:
            inputs.append((guidance.to(self._dtype) * 1000).expand(times.shape))
        inputs.append(pooled.expand(*times.shape, -1))
        activated = nn.functional.silu(self._rows(self._embed, *inputs))  # (S, dim)
        return torch.cat([self._rows(linear, activated) for linear in self._linears], dim=1)  # (S, W)

    def _rows(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """Run a module on each row by itself, its weights being on the device for the time of the call.

        Not on all rows at once: a product of many rows rounds otherwise than that of one, which a step would make.
        """
        weights = {name: weight.to(self._device, non_blocking=True) for name, weight in module.named_parameters()}
        rows = zip(*(tensor.chunk(tensor.shape[0]) for tensor in inputs), strict=True)
        return torch.cat([torch.func.functional_call(module, weights, row) for row in rows])


class TableRow(nn.Module):
    """In the place of time_text_embed: the row of the table, which comes in the place of the pooled prompt."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """The last input."""
        return inputs[-1]


class TableSlice(nn.Module):
    """In the place of a norm's linear layer: the norm's own part of a row."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start = start
        self.stop = stop

    def forward(self, row: Tensor) -> Tensor:
        """Row (B, W) -> (B, stop - start)."""
        return row[:, self.start : self.stop]


def modulated_norms(transformer: FluxTransformer2DModel) -> list[Any]:
    """The norms that read the embedding, in the order of the table."""
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    norms = [getattr(block, name) for block in blocks for name in NORMS if hasattr(block, name)]
    return [*norms, transformer.norm_out]


def read_table(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A view of a transformer that reads rows of its table: the same weights, but for those that make the table."""
    width = 0

    def reading(norm: nn.Module) -> nn.Module:
        nonlocal width
        outputs = cast(nn.Linear, norm.linear).out_features
        width += outputs
        return view_of(norm, silu=nn.Identity(), linear=TableSlice(width - outputs, width))

    def reading_block(block: nn.Module) -> nn.Module:
        return with_norms(block, reading)

    return view_of(  # the order of the arguments is that of the table
        transformer,
        time_text_embed=TableRow(),
        transformer_blocks=nn.ModuleList(map(reading_block, transformer.transformer_blocks)),
        single_transformer_blocks=nn.ModuleList(map(reading_block, transformer.single_transformer_blocks)),
        norm_out=reading(transformer.norm_out),
    )


def with_norms(block: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A view of a block whose norms are what `make` gives for each."""
    return view_of(block, **{name: make(getattr(block, name)) for name in NORMS if hasattr(block, name)})


def view_of(module: Module, **replaced: nn.Module) -> Module:
    """A second object over the same weights, some of whose submodules are others; the first stays as it is."""
    view = copy.copy(module)
    view._modules = {**module._modules, **replaced}
    return view


def _to_host(module: nn.Module) -> None:
    for parameter in module.parameters():
        data = parameter.data.cpu()
        parameter.data = data.pin_memory() if torch.cuda.is_available() else data

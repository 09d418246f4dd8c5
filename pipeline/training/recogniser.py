"""A recogniser's ONNX file as a network of torch, so that the gradient of the ID loss can go through it.

It knows the operators of ArcFace's residual nets (insightface's `w600k_r50.onnx`, `glintr100.onnx`) and of small ones.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import WeightsCorrupt

Attributes = Mapping[str, Any]


class OnnxNetwork(nn.Module):
    """Runs a graph of one input and one output; its weights are frozen buffers."""

    def __init__(self, path: Path) -> None:
        """Raises WeightsCorrupt where the file cannot be read, or holds operators other than a recogniser's."""
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from onnx import helper, numpy_helper

        super().__init__()
        try:
            graph = onnx.load(path).graph
        except (OSError, DecodeError) as error:
            raise WeightsCorrupt(f"{path} cannot be read as an ONNX model; fetch it again.") from error
        unknown = sorted({node.op_type for node in graph.node} - OPERATORS.keys())
        if unknown:
            raise WeightsCorrupt(f"{path} is no recogniser that can be trained through: it has {', '.join(unknown)}.")
        self._names: dict[str, str] = {}
        for number, weight in enumerate(graph.initializer):
            self._names[weight.name] = f"weight_{number}"
            self.register_buffer(f"weight_{number}", torch.from_numpy(numpy_helper.to_array(weight).copy()))
        self._nodes = [
            (
                node.op_type,
                list(node.input),
                node.output[0],
                {a.name: helper.get_attribute_value(a) for a in node.attribute},
            )
            for node in graph.node
        ]
        (self._input,) = (value.name for value in graph.input if value.name not in self._names)
        self._output = graph.output[0].name

    def forward(self, crops: Tensor) -> Tensor:
        """Face crops (B, 3, 112, 112), RGB in -1..1 -> embeddings (B, E), not normalised."""
        values = {name: getattr(self, buffer) for name, buffer in self._names.items()} | {self._input: crops, "": None}
        for operator, inputs, output, attributes in self._nodes:
            values[output] = OPERATORS[operator](attributes, *(values[name] for name in inputs))
        embeddings: Tensor = values[self._output]
        return embeddings


def _convolution(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    stride, dilation = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    return functional.conv2d(_padded(attributes, x), weight, bias, stride, 0, dilation, attributes.get("group", 1))


def _padded(attributes: Attributes, x: Tensor, value: float = 0.0) -> Tensor:
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    return functional.pad(x, (left, right, top, bottom), value=value) if any((top, left, bottom, right)) else x


def _batch_norm(
    attributes: Attributes, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return functional.batch_norm(x, mean, variance, scale, shift, eps=attributes.get("epsilon", 1e-5))


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    padded = _padded(attributes, x, float("-inf"))
    return functional.max_pool2d(padded, attributes["kernel_shape"], attributes.get("strides", [1, 1]))


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return functional.avg_pool2d(_padded(attributes, x), attributes["kernel_shape"], attributes.get("strides", [1, 1]))


def _dense(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = weight if attributes.get("transB") else weight.T
    product: Tensor = attributes.get("alpha", 1.0) * functional.linear(x, weight)
    return product if bias is None else product + attributes.get("beta", 1.0) * bias


def _slice(_: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor) -> Tensor:
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        x = x.narrow(axis, start, min(end, x.shape[axis]) - start)
    return x


OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: a / b,
    "Relu": lambda _, x: functional.relu(x),
    "PRelu": lambda _, x, slope: torch.where(x < 0, slope * x, x),
    "Sigmoid": lambda _, x: torch.sigmoid(x),
    "Flatten": lambda _, x: x.flatten(1),
    "Identity": lambda _, x: x,
    "Dropout": lambda _, x, *__: x,
    "GlobalAveragePool": lambda _, x: x.mean(dim=(2, 3), keepdim=True),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda _, x: x.float(),  # weights that are stored as halves
    "Conv": _convolution,
    "Gemm": _dense,
    "MaxPool": _max_pool,
    "Slice": _slice,
}

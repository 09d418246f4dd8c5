"""Three small recognisers with ArcFace's interface, of three families, and the ONNX file that insightface reads.

They tell the same people apart but see them in different ways: what fools one of them does not fool the others.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.alignment import ARCFACE_SIZE

EMBEDDING = 512
FAMILIES = ("residual", "smooth", "plain")


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, 3, stride), activation, *convolution(outputs, outputs, 3, 1)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Sequential(*(() if same else convolution(inputs, outputs, 1, stride)))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return self.activation(self.body(x) + self.shortcut(x))  # type: ignore[no-any-return]


def convolution(inputs: int, outputs: int, size: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """A convolution with its batch norm; it pads so that only the stride changes the size, a patch not at all."""
    padding = 0 if size == stride else size // 2
    return [
        nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def head(features: int) -> list[nn.Module]:
    """Features -> the embedding (B, 512).

    As in ArcFace a batch norm without scale ends it: embeddings have a mean of nought over people, so that strangers
    have a cosine of about nought, and a length of about the square root of 512.
    """
    return [nn.Flatten(), nn.Linear(features, EMBEDDING, bias=False), nn.BatchNorm1d(EMBEDDING, affine=False)]


def build(family: str) -> nn.Sequential:
    """A recogniser: crops (B, 3, 112, 112) in -1..1, RGB -> embeddings (B, 512), not normalised."""
    return {"residual": _residual, "smooth": _smooth, "plain": _plain}[family]()


def _residual() -> nn.Sequential:
    """ReLUs, and the mean over the whole face."""
    return nn.Sequential(
        *convolution(3, 24, 3, 2),
        nn.ReLU(),
        Residual(24, 32, 2, nn.ReLU()),
        Residual(32, 64, 2, nn.ReLU()),
        Residual(64, 128, 2, nn.ReLU()),
        Residual(128, 128, 1, nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        *head(128),
    )


def _smooth() -> nn.Sequential:
    """Smooth everywhere, as gradients go through it to pictures; each place of the face has its own weight."""
    return nn.Sequential(
        *convolution(3, 32, 5, 2),
        nn.SiLU(),
        nn.AvgPool2d(2),
        Residual(32, 40, 1, nn.SiLU()),
        Residual(40, 72, 2, nn.SiLU()),
        Residual(72, 72, 1, nn.SiLU()),
        Residual(72, 120, 2, nn.SiLU()),
        *convolution(120, 240, 1, 1),
        nn.SiLU(),
        *_each_place(240, 7),
        *head(240),
    )


def _plain() -> nn.Sequential:
    """Patches, no shortcuts, and a dense layer over all places, as in VGG."""
    return nn.Sequential(
        *convolution(3, 48, 4, 4),
        nn.ReLU(),
        *convolution(48, 48, 3, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *convolution(48, 96, 3, 1),
        nn.ReLU(),
        *convolution(96, 96, 3, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *convolution(96, 144, 3, 1),
        nn.ReLU(),
        *convolution(144, 24, 1, 1),
        nn.ReLU(),
        *head(24 * 7 * 7),
    )


def _each_place(channels: int, size: int) -> list[nn.Module]:
    """MobileFaceNet's pooling: a weight for every place and channel."""
    return [nn.Conv2d(channels, channels, size, groups=channels, bias=False), nn.BatchNorm2d(channels)]


class _Graph:
    """Nodes and weights of an ONNX graph, from modules whose kind it knows."""

    def __init__(self) -> None:
        self.nodes: list[object] = []
        self.weights: list[object] = []

    def add(self, module: nn.Module, x: str) -> str:
        """Append what a module does to the value named x; the name of its result."""
        if isinstance(module, nn.Sequential):
            for part in module:
                x = self.add(part, x)
            return x
        if isinstance(module, Residual):
            both = [self.add(module.body, x), self.add(module.shortcut, x)]
            return self.add(module.activation, self.node("Add", both))
        if isinstance(module, nn.SiLU):
            return self.node("Mul", [x, self.node("Sigmoid", [x])])
        kind, weights, attributes = _operation(module)
        return self.node(kind, [x, *map(self.weight, weights)], **attributes)

    def node(self, kind: str, inputs: Sequence[str], **attributes: object) -> str:
        from onnx import helper

        # insightface takes a graph whose first nodes are named Sub and Mul for one that scales its pixels itself
        name = f"node_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, value: Tensor) -> str:
        from onnx import TensorProto, numpy_helper

        name = f"weight_{len(self.weights)}"
        # matrices and kernels in half the room; the graph computes in float32
        kind = np.float16 if value.ndim > 1 else np.float32
        self.weights.append(numpy_helper.from_array(value.detach().numpy().astype(kind), name))
        return name if kind is np.float32 else self.node("Cast", [name], to=TensorProto.FLOAT)


def _operation(module: nn.Module) -> tuple[str, tuple[Tensor, ...], dict[str, object]]:
    """ONNX's operator, its weights and attributes for one of torch's modules in eval mode."""
    match module:
        case nn.Conv2d():
            pads, strides = [*module.padding, *module.padding], [*module.stride]
            return "Conv", (module.weight,), {"pads": pads, "strides": strides, "group": module.groups}
        case nn.BatchNorm2d() | nn.BatchNorm1d():
            assert module.running_mean is not None
            assert module.running_var is not None
            mean, variance = module.running_mean, module.running_var
            scale = module.weight if module.affine else torch.ones_like(mean)
            shift = module.bias if module.affine else torch.zeros_like(mean)
            return "BatchNormalization", (scale, shift, mean, variance), {"epsilon": module.eps}
        case nn.Linear():
            return "Gemm", (module.weight,), {"transB": 1}
        case nn.ReLU():
            return "Relu", (), {}
        case nn.Flatten():
            return "Flatten", (), {}
        case nn.AdaptiveAvgPool2d():
            return "GlobalAveragePool", (), {}
        case nn.MaxPool2d() | nn.AvgPool2d():
            size = [int(module.kernel_size)] * 2  # type: ignore[arg-type]
            kind = "MaxPool" if isinstance(module, nn.MaxPool2d) else "AveragePool"
            return kind, (), {"kernel_shape": size, "strides": size}
        case _:
            raise TypeError(f"no ONNX operator for {type(module).__name__}")


def write_onnx(network: nn.Sequential, path: Path) -> None:
    """Write a recogniser as ArcFace's are stored: crops (N, 3, 112, 112) -> one output (N, 512)."""
    import onnx
    from onnx import TensorProto, helper

    graph = _Graph()
    result = graph.add(network.eval(), "crops")
    crops = helper.make_tensor_value_info("crops", TensorProto.FLOAT, ["N", 3, ARCFACE_SIZE, ARCFACE_SIZE])
    embeddings = helper.make_tensor_value_info(result, TensorProto.FLOAT, ["N", EMBEDDING])
    body = helper.make_graph(graph.nodes, "recogniser", [crops], [embeddings], graph.weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)

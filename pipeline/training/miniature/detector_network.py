"""The miniature's face detector: one small network that looks at halves, quarters and eighths of a photo.

However large a face, in one of the three it is 15 to 42 pixels large, so one network that knows such faces is enough.
Its cells are 4 pixels apart: 8, 16 and 32 in the photo, which are SCRFD's strides. Each cell's two anchors take the
smaller and the larger of these faces. Colours are left out: the real faces to learn from are gray.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

LUMINANCE = (0.299, 0.587, 0.114)
POOLS = (2, 4, 8)  # of the photo; times the network's own stride of 4: SCRFD's strides 8, 16, 32
ANCHORS = 2
VALUES = (1, 4, 10)  # an anchor's score, box and points
# Added to a score before the sigmoid: a mean of two is cautious. Chosen once on the trained network, so that the
# threshold of 0.5 lies between the least sure of insightface's six sample faces and the worst of the other pictures.
BOLDER = 0.7
# Where slices start and end, and how they step; of a picture (1, C, H, W) they take columns
SLICES = {"first": 0, "second": 1, "last": -1, "before_all": -(2**31), "on": 1, "back": -1, "across": 3}
REACH = (2.5, 4.0)  # half a typical face of each anchor, in strides
# What the network's raw numbers mean: a box's and the points' distances from the anchor, in parts of REACH
TYPICAL = (
    (1.0,) * 4,
    (-0.8, -0.4, 0.8, -0.4, 0.0, 0.1, -0.6, 0.6, 0.6, 0.6),
)


class DetectorNetwork(nn.Module):
    """Gray pictures (B, 1, H, W), -1..1 -> scores before the sigmoid, distances of boxes and points, all in strides.

    Shapes (B, 2, 1 | 4 | 10, H / 4, W / 4), the second axis the anchors'.
    """

    def __init__(self, stem: int = 16, width: int = 48, depth: int = 6) -> None:
        super().__init__()
        widths = (1, stem, width, *[width] * depth)
        strides = (2, 2, *[1] * depth)
        self.body = nn.Sequential(
            *[
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
                )
                for before, after, stride in zip(widths, widths[1:], strides, strict=False)
            ]
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, ANCHORS * values, 1) for values in VALUES)
        nn.init.constant_(cast(Tensor, cast(nn.Conv2d, self.heads[0]).bias), -3.0)  # faces are rare

    def forward(self, gray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        hidden = self.body(gray)  # (B, width, H / 4, W / 4)
        raw = [head(hidden).unflatten(1, (ANCHORS, -1)) for head in self.heads]  # (B, 2, values, H / 4, W / 4)
        boxes, points = (self._distances(*pair) for pair in zip(raw[1:], TYPICAL, strict=True))
        return raw[0], boxes, points

    @staticmethod
    def _distances(raw: Tensor, typical: Sequence[float]) -> Tensor:
        reach = raw.new_tensor(REACH)[:, None, None, None]
        return (raw + raw.new_tensor(typical)[:, None, None]) * reach


def write_onnx(network: DetectorNetwork, path: Path) -> None:
    """Write the trained network with SCRFD's interface: a photo (1, 3, H, W) of any size that 32 divides -> 9 outputs.

    They are, for strides 8, 16, 32, scores (cells * 2, 1), then boxes (cells * 2, 4), then points (cells * 2, 10), as
    insightface's class reads them. Batch normalisation and the scale of the distances go into the weights. A score is
    that of the mean of what the network says to the photo and to its mirror image, which halves what it only fancies;
    the cells of the mirror image lie on those of the photo, one column on, so that the first has no other.
    """
    from onnx import helper, numpy_helper

    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []

    def weight(name: str, value: Tensor) -> str:
        weights.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    body = [[weight(f"body.{i}.{part}", value) for part, value in zip(("weight", "bias"), folded(layer), strict=True)]
            for i, layer in enumerate(network.body)]  # fmt: skip
    heads = [[weight(f"heads.{i}.{part}", value) for part, value in zip(("weight", "bias"), pair, strict=True)]
             for i, pair in enumerate(scaled_heads(network))]  # fmt: skip
    shapes = [weight(f"rows.{values}", torch.tensor([-1, values])) for values in VALUES]
    bounds = {name: weight(name, torch.tensor([value])) for name, value in SLICES.items()}
    bolder = weight("bolder", torch.tensor(BOLDER))

    def layers(picture: str, name: str) -> str:
        for i, layer in enumerate(network.body):
            stride = cast(nn.Conv2d, cast(nn.Sequential, layer)[0]).stride[0]
            out = add("Conv", [picture, *body[i]], f"conv.{name}.{i}", strides=[stride] * 2, pads=[1] * 4)
            picture = add("Relu", [out], f"hidden.{name}.{i}")
        return picture

    def columns(picture: str, start: str, end: str, step: str) -> str:
        return add("Slice", [picture, *(bounds[key] for key in (start, end, "across", step))], f"{picture}.{end}")

    photo = add("Conv", ["photo", weight("luminance", torch.tensor(LUMINANCE)[None, :, None, None])], "gray")
    for pool in POOLS:
        photo = add("AveragePool", [photo], f"pooled{pool}", kernel_shape=[2, 2], strides=[2, 2])
        hidden = layers(photo, f"{pool}")
        mirrored = layers(columns(photo, "last", "before_all", "back"), f"mirrored{pool}")
        for i, name in enumerate(("score", "box", "points")):
            out = add("Conv", [hidden, *heads[i]], f"{name}{pool}.conv")
            if name == "score":
                other = columns(add("Conv", [mirrored, *heads[0]], f"{out}.mirrored"), "last", "first", "back")
                other = add("Concat", [columns(out, "first", "second", "on"), other], f"{out}.again", axis=3)
                mean = add("Mean", [out, other], f"{out}.mean")
                out = add("Sigmoid", [add("Add", [mean, bolder], f"{mean}.bolder")], f"score{pool}.sure")
            out = add("Transpose", [out], f"{name}{pool}.last", perm=[0, 2, 3, 1])
            add("Reshape", [out, shapes[i]], f"{name}{pool * 4}")
    _save(nodes, weights, path)


def _save(nodes: list["NodeProto"], weights: list["TensorProto"], path: Path) -> None:
    import onnx
    from onnx import helper

    float32 = onnx.TensorProto.FLOAT
    outputs = [
        helper.make_tensor_value_info(f"{name}{pool * 4}", float32, [f"anchors{pool * 4}", values])
        for name, values in zip(("score", "box", "points"), VALUES, strict=True)
        for pool in POOLS
    ]
    inputs = [helper.make_tensor_value_info("photo", float32, [1, 3, "height", "width"])]
    graph = helper.make_graph(nodes, "scrfd_miniature", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def read_onnx(path: Path) -> DetectorNetwork:
    """The network that `write_onnx` wrote, in eval mode: its normalisations do nothing but add a bias."""
    import onnx
    from onnx import numpy_helper

    values = {weight.name: torch.from_numpy(numpy_helper.to_array(weight).copy())
              for weight in onnx.load(path).graph.initializer}  # fmt: skip
    widths = [len(values[name]) for name in values if name.startswith("body.") and name.endswith(".bias")]
    network = DetectorNetwork(widths[0], widths[1], len(widths) - 2).eval()
    with torch.no_grad():
        for i, layer in enumerate(network.body):
            conv, norm = (cast(nn.Sequential, layer)[part] for part in range(2))
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_var is not None
            cast(nn.Conv2d, conv).weight.copy_(values[f"body.{i}.weight"])
            norm.bias.copy_(values[f"body.{i}.bias"])
            norm.running_var.fill_(1 - norm.eps)
        for i, (head, typical) in enumerate(zip(network.heads, ((0.0,), *TYPICAL), strict=True)):
            assert isinstance(head, nn.Conv2d)
            assert head.bias is not None
            reach = torch.tensor(REACH if i else (1.0, 1.0)).repeat_interleave(len(typical))
            head.weight.copy_(values[f"heads.{i}.weight"] / reach[:, None, None, None])
            head.bias.copy_(values[f"heads.{i}.bias"] / reach - torch.tensor(typical * ANCHORS))
    return network


def folded(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that has taken in the batch normalisation after it."""
    conv, norm = (cast(nn.Sequential, layer)[i] for i in range(2))
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


def scaled_heads(network: DetectorNetwork) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the heads, those of boxes and points in strides."""
    pairs = []
    for head, typical in zip(network.heads, ((0.0,), *TYPICAL), strict=True):
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        reach = torch.tensor(REACH if len(typical) > 1 else (1.0, 1.0)).repeat_interleave(len(typical))
        bias = (head.bias + torch.tensor(typical * ANCHORS)) * reach
        pairs.append((head.weight * reach[:, None, None, None], bias))
    return pairs

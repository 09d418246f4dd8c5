"""Face networks by rule, in the real file formats, for tests: they fire on red squares instead of faces."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pipeline.models.detection import Candidate, build_bisenet, build_retinaface

# five points as parts of a box
FACE = np.array([[0.3, 0.35], [0.7, 0.35], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)
RED = (255, 0, 0)


def candidate(left: float, top: float, right: float, bottom: float, score: float = 0.9) -> Candidate:
    """A found face whose points are FACE in its box."""
    box = np.array([left, top, right, bottom], np.float32)
    return Candidate(box, score, (box[:2] + FACE * (box[2:] - box[:2])).astype(np.float32))


def red_squares(size: tuple[int, int], *corners: tuple[int, int], edge: int = 64) -> NDArray[np.uint8]:
    """A blue photo (height, width of `size`) with red squares at these left top corners."""
    photo = np.full((size[1], size[0], 3), (0, 0, 255), np.uint8)
    for left, top in corners:
        photo[top : top + edge, left : left + edge] = RED
    return photo


def write_scrfd(path: Path, largest: int = 640) -> Path:
    """SCRFD's interface (9 outputs, strides 8, 16, 32, 2 anchors): fires on red cells of 32, up to this input size.

    A face's box is three cells wide and high around the cell's corner; its points are FACE.
    """
    nodes, weights = [], []

    def constant(name: str, values: object, kind: type = np.float32) -> str:
        weights.append(numpy_helper.from_array(np.array(values, kind), name))
        return name

    def add(kind: str, inputs: Iterable[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    height = add("Gather", [add("Shape", ["photo"], "shape"), constant("two", 2, np.int64)], "height")
    excess = add("Sub", [constant("largest", largest), add("Cast", [height], "height_float", to=1)], "excess")
    gate = add("Min", [excess, constant("zero", 0)], "gate")  # far below 0 beyond the largest size
    points = FACE * 3 - 1.5
    for stride in (8, 16, 32):
        mean = add("AveragePool", ["photo"], f"mean{stride}", kernel_shape=[stride] * 2, strides=[stride] * 2)
        red = [[4.0, -4.0, -4.0], [0, 0, 0]] if stride == 32 else np.zeros((2, 3))
        parts = {
            "score": (red, [-9.0, -9.0], 1),
            "box": (np.zeros((8, 3)), [1.5] * 8, 4),
            "points": (np.zeros((20, 3)), np.tile(points.ravel(), 2), 10),
        }
        for name, (weight, bias, width) in parts.items():
            label = f"{name}{stride}"
            kernel = constant(f"w_{label}", np.array(weight)[..., None, None])
            out = add("Conv", [mean, kernel, constant(f"b_{label}", bias)], f"conv_{label}")
            if name == "score":
                out = add("Sigmoid", [add("Add", [out, gate], f"gated_{label}")], f"sure_{label}")
            out = add("Transpose", [out], f"last_{label}", perm=[0, 2, 3, 1])
            add("Reshape", [out, constant(f"s_{label}", [-1, width], np.int64)], label)
    outputs = [
        helper.make_tensor_value_info(f"{name}{stride}", TensorProto.FLOAT, [f"n{name}{stride}", width])
        for name, width in (("score", 1), ("box", 4), ("points", 10))
        for stride in (8, 16, 32)
    ]
    return _save(path, nodes, weights, ["N", 3, "H", "W"], outputs)


def write_arcface(path: Path) -> Path:
    """ArcFace's interface (N, 3, 112, 112) -> (N, 512): means of 7 x 7 pixels, first all of red, then all of green."""
    numbers = {"start": 0, "end": 512, "axis": 1}
    weights = [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in numbers.items()]
    nodes = [
        helper.make_node("AveragePool", ["photo"], ["mean"], kernel_shape=[7, 7], strides=[7, 7]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Slice", ["flat", "start", "end", "axis"], ["embedding"]),
    ]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 512])]
    return _save(path, nodes, weights, ["N", 3, 112, 112], outputs)


def retinaface_weights(score: float, edge: float) -> dict[str, torch.Tensor]:
    """State of facexlib's RetinaFace, under DataParallel's names: a face of this edge and score in each cell of 32.

    Its points are FACE mirrored top to bottom, so that they cannot be taken for the other detector's.
    """
    state = {name: _small(weight, 0) for name, weight in build_retinaface("cpu").state_dict().items()}
    anchor = 256  # the smaller of the coarsest level's two; variances 0.1 and 0.2
    upside = (FACE * (1, -1) + (0, 1) - 0.5) * edge / anchor / 0.1
    logit = np.log(score / (1 - score))
    for level in range(3):
        fires = level == 2
        state[f"ClassHead.{level}.conv1x1.bias"] = torch.tensor([0, logit if fires else -9, 9, 0]).float()
        state[f"BboxHead.{level}.conv1x1.bias"] = torch.tensor([0, 0, *[np.log(edge / anchor) / 0.2] * 2] * 2).float()
        state[f"LandmarkHead.{level}.conv1x1.bias"] = torch.tensor(np.tile(upside.ravel(), 2)).float()
    return {f"module.{name}": weight for name, weight in state.items()}


def bisenet_weights(label: int, width: int = 64) -> dict[str, torch.Tensor]:
    """State of facexlib's BiSeNet that sees this label everywhere."""
    state = {name: _small(weight, 0) for name, weight in build_bisenet(width).state_dict().items()}
    state["conv_out.conv.bn.bias"] = _small(state["conv_out.conv.bn.bias"], 1)
    weight = state["conv_out.conv_out.weight"]
    state["conv_out.conv_out.weight"] = torch.eye(19)[label][:, None, None, None].expand(weight.shape)
    return state


def _small(weight: torch.Tensor, value: float) -> torch.Tensor:
    """A constant of the weight's shape that takes no room, neither in memory nor in a file."""
    return torch.full((), value, dtype=weight.dtype).expand(weight.shape)


def _save(path: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: list, outputs: list) -> Path:
    photo = helper.make_tensor_value_info("photo", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "by_rule", [photo], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path

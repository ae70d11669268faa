"""Networks from ONNX files against onnxruntime and against the networks that they were exported from."""

import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.testing import assert_close

from fairness_dft.networks.onnx import OnnxNetwork


class Residual(nn.Module):
    """The block that ArcFace's networks consist of."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.short(x)


def arcface() -> nn.Module:
    body = [nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), Residual(4, 6), Residual(6, 8)]
    return nn.Sequential(*body, nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 16, 5), nn.BatchNorm1d(5))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 5, 2, (1, 2), groups=3), nn.Conv2d(6, 4, 3, dilation=2)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first((x - 0.5) / 0.25).relu(), 3, 1, 1)
        x = self.second(x).sigmoid() * self.scale
        x = nn.functional.adaptive_avg_pool2d(x, 1).reshape(-1, 2, 2)
        return x.permute(0, 2, 1) @ torch.eye(2).flip(0)


def exported(network: nn.Module, file: Path) -> nn.Module:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.5, 1.5)
            for values in (module.bias.data, module.running_mean):
                values.uniform_(-0.5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"input_names": ["input.1"], "dynamic_axes": {"input.1": {0: "n"}}, "dynamo": False}
        # As trained networks are exported: batch norms and dropout stay operators of their own.
        preserve = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(network.eval(), (torch.rand(2, 3, 16, 16),), str(file), training=preserve, **options)
    return network


@pytest.mark.parametrize("make", [arcface, Mixed])
def test_equals_onnxruntime_and_has_the_gradient_of_the_original(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    original = exported(make(), tmp_path / "network.onnx")
    network = OnnxNetwork(tmp_path / "network.onnx")
    assert network.input_shape[1:] == (3, 16, 16)
    assert not any(p.requires_grad for p in network.parameters()) and not list(network.buffers())
    pixels = torch.rand(3, 3, 16, 16, requires_grad=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "network.onnx"), providers=["CPUExecutionProvider"])
    [expected] = session.run(None, {"input.1": pixels.detach().numpy()})
    outputs = network(pixels)
    assert_close(outputs, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    assert_close(outputs, original(pixels), rtol=1e-4, atol=1e-5)
    weights = torch.rand_like(outputs)
    [gradient] = torch.autograd.grad((outputs * weights).sum(), pixels)
    [reference] = torch.autograd.grad((original(pixels) * weights).sum(), pixels)
    assert_close(gradient, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "shapes", "attributes"),
    [
        ("Gemm", [(2, 3), (3, 4)], {}),
        ("Gemm", [(3, 2), (4, 3), (4,)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
        ("PRelu", [(2, 3, 4, 4), (3, 1, 1)], {}),
        ("Conv", [(1, 2, 6, 6), (4, 2, 3, 2), (4,)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
        ("MaxPool", [(1, 2, 5, 5)], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("Flatten", [(2, 3, 4, 4)], {"axis": 2}),
        ("Identity", [(2, 3)], {}),
    ],
)
def test_operators_equal_onnxruntime(
    operator: str, shapes: list[tuple[int, ...]], attributes: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in shapes]
    names = [f"x.{i}" for i in range(len(shapes))]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, tensor.shape, tensor.flatten().tolist())
        for name, tensor in zip(names[1:], tensors[1:], strict=True)
    ]
    given = helper.make_tensor_value_info(names[0], TensorProto.FLOAT, shapes[0])
    found = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], **attributes)], "g", [given], [found], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "one.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), providers=["CPUExecutionProvider"])
    [expected] = session.run(None, {names[0]: tensors[0].numpy()})
    assert_close(OnnxNetwork(tmp_path / "one.onnx")(tensors[0]), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match="broken.onnx' is not an ONNX file"):
        OnnxNetwork(tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match="missing.onnx' is not an ONNX file"):
        OnnxNetwork(tmp_path / "missing.onnx")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "abc"]
    for nodes, inputs, outputs, message in (
        (
            [helper.make_node("Erf", ["a"], ["b"]), helper.make_node("Cos", ["b"], ["c"])],
            [0],
            [2],
            "operators: Cos, Erf",
        ),
        ([helper.make_node("Conv", ["a", "a"], ["c"], auto_pad="SAME_UPPER")], [0], [2], "operators: auto_pad of Conv"),
        ([helper.make_node("MaxPool", ["a"], ["c"], ceil_mode=1)], [0], [2], "operators: ceil_mode of MaxPool"),
        ([helper.make_node("MaxPool", ["a"], ["c"], dilations=[2, 2])], [0], [2], "operators: dilations of MaxPool"),
        ([helper.make_node("Add", ["a", "b"], ["c"])], [0, 1], [2], "must have one input and one output"),
    ):
        graph = helper.make_graph(nodes, "g", [values[i] for i in inputs], [values[i] for i in outputs])
        onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
        with pytest.raises(ValueError, match=message):
            OnnxNetwork(tmp_path / "other.onnx")


def test_constants_of_any_kind_and_half_precision(tmp_path: Path) -> None:
    half = helper.make_tensor("half", TensorProto.FLOAT16, [3], [0.5, 2.0, -1.0])
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [0, -1])
    nodes = [
        helper.make_node("Constant", [], ["factor"], value_float=1.5),
        helper.make_node("Mul", ["x", "half"], ["y"]),
        helper.make_node("Mul", ["y", "factor"], ["z"]),
        helper.make_node("Reshape", ["z", "shape"], ["r"]),
        helper.make_node("Identity", ["r"], ["out"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 1, 3])
    found = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [given], [found], [half, shape])), tmp_path / "n.onnx")
    x = torch.rand(2, 1, 3)
    expected = (x * torch.tensor([0.75, 3.0, -1.5])).reshape(2, 3)
    assert_close(OnnxNetwork(tmp_path / "n.onnx")(x), expected)

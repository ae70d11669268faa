"""A convolutional network from an ONNX file, as differentiable PyTorch.

onnxruntime gives no gradients, but the common face networks come as ONNX files. They consist of a handful of operators,
each of which PyTorch has under another name.

References:
    Open Neural Network Exchange, operator schemas, https://onnx.ai/onnx/operators/
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OnnxNetwork(nn.Module):
    """The network of an ONNX file with one input and one output, frozen and in evaluation mode.

    Args:
        file: The ONNX file.

    Raises:
        ValueError: If it is not one, or has unsupported operators or attributes.

    Attributes:
        input_shape: Shape of the input, with 0 for each dimension that may vary.
        first_names: Names of the first nodes, which show whether the network normalizes its pixels.
    """

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        import onnx

        try:
            model = onnx.load(str(file))
        except Exception as error:  # of protobuf, or of the file system
            raise ValueError(f"{str(file)!r} is not an ONNX file") from error
        graph = model.graph
        constants = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
        inputs = [value for value in graph.input if value.name not in constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ValueError(f"{str(file)!r} must have one input and one output")
        self._nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        for node in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                [value] = attributes.values()
                is_tensor = isinstance(value, onnx.TensorProto)
                constants[node.output[0]] = onnx.numpy_helper.to_array(value) if is_tensor else np.asarray(value)
            else:
                self._nodes.append((node.op_type, list(node.input), node.output[0], attributes))
        parts = {part for operator, *_, attributes in self._nodes for part in unsupported(operator, attributes)}
        if parts:
            raise ValueError(f"{str(file)!r} has unsupported operators: {', '.join(sorted(parts))}")
        # Parameters, since DDP broadcasts buffers in every step; shapes stay numbers.
        self._weights = nn.ParameterList()
        self._constants: dict[str, Any] = {}
        for name, values in constants.items():
            if np.issubdtype(values.dtype, np.floating):
                self._constants[name] = len(self._weights)
                self._weights.append(nn.Parameter(torch.from_numpy(values.astype(np.float32)), requires_grad=False))
            else:
                self._constants[name] = values.tolist()
        self._input, self._output = inputs[0].name, graph.output[0].name
        self._last = {name: i for i, (_, names, *_) in enumerate(self._nodes) for name in names}
        self.input_shape = tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim)
        self.first_names = [node.name for node in graph.node[:8]]

    def forward(self, pixels: Tensor) -> Tensor:
        """Run the network on its input."""
        values: dict[str, Tensor] = {self._input: pixels}
        for i, (operator, names, output, attributes) in enumerate(self._nodes):
            given = [self._value(values, name) if name else None for name in names]
            values[output] = OPERATORS[operator](attributes, *given)
            for name in names:
                if self._last[name] == i and name != self._output:
                    values.pop(name, None)  # no later node reads it
        return values[self._output]

    def _value(self, values: dict[str, Tensor], name: str) -> Tensor | list[int]:
        if name in values:
            return values[name]
        constant = self._constants[name]
        found: Tensor | list[int] = self._weights[constant] if isinstance(constant, int) else constant
        return found


def unsupported(operator: str, attributes: dict[str, Any]) -> list[str]:
    """Return what this module does not support in a node: the operator, or attributes that would change its result."""
    if operator not in OPERATORS:
        return [operator]
    known = ATTRIBUTES.get(operator, ())
    return [
        f"{name} of {operator}"
        for name, value in attributes.items()
        if name not in known and value not in (0, b"NOTSET") and not (name == "dilations" and set(value) == {1})
    ]


def _padded(attributes: dict[str, Any], x: Tensor, value: float = 0.0) -> Tensor:
    """Return the input padded by an operator's `pads` (top, left, bottom, right)."""
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    return F.pad(x, (left, right, top, bottom), value=value) if top or left or bottom or right else x


def _convolution(attributes: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilations = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
    x = _padded(attributes, x)
    return F.conv2d(x, weight, bias, tuple(strides), 0, tuple(dilations), attributes.get("group", 1))


def _batch_norm(
    attributes: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, eps=attributes.get("epsilon", 1e-5))


def _max_pool(attributes: dict[str, Any], x: Tensor) -> Tensor:
    x = _padded(attributes, x, value=float("-inf"))
    return F.max_pool2d(x, tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", (1, 1))))


def _gemm(attributes: dict[str, Any], a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = (a.T if attributes.get("transA") else a), (b.T if attributes.get("transB") else b)
    product: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    return product if c is None else product + attributes.get("beta", 1.0) * c


def _reshape(attributes: dict[str, Any], x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda _, a, b: a + b,
    "BatchNormalization": _batch_norm,
    "Conv": _convolution,
    "Div": lambda _, a, b: a / b,
    "Dropout": lambda _, x, *__: x,
    "Flatten": lambda attributes, x: x.reshape(math.prod(x.shape[: attributes.get("axis", 1)]), -1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "Identity": lambda _, x: x,
    "MatMul": lambda _, a, b: a @ b,
    "MaxPool": _max_pool,
    "Mul": lambda _, a, b: a * b,
    "PRelu": lambda _, x, slope: torch.where(x < 0, slope * x, x),
    "Relu": lambda _, x: x.relu(),
    "Reshape": _reshape,
    "Sigmoid": lambda _, x: x.sigmoid(),
    "Sub": lambda _, a, b: a - b,
    "Transpose": lambda attributes, x: x.permute(tuple(attributes["perm"])),
}

# The attributes that each operator supports; momentum, ratio and seed have no effect outside of training.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Conv": ("kernel_shape", "pads", "strides", "dilations", "group"),
    "Flatten": ("axis",),
    "Gemm": ("alpha", "beta", "transA", "transB"),
    "MaxPool": ("kernel_shape", "pads", "strides"),
    "Transpose": ("perm",),
    "BatchNormalization": ("epsilon", "momentum", "spatial"),
    "Dropout": ("ratio", "seed"),
}

"""The integer products of a compiled program: linear layers and convolutions, and what they take in of what follows."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastforward_kernels import ops_chain
from fastforward_kernels.int_mm import int_mm
from torch.fx import Graph, Node

from fastforward.integer import epilogue as epilogues
from fastforward.integer import onednn
from fastforward.integer.conv import IntegerConv1d, IntegerConv2d, IntegerConv3d
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, arguments
from fastforward.integer.grid import LEVELS

F = torch.nn.functional
ROUND = ops_chain.ROUND_TO_CODES
LINEAR, LINEAR_TO_CODES = ops_chain.LINEAR_TO_FLOATS, ops_chain.LINEAR_TO_CODES
ADDS_CODES, PLUS_CODES = ops_chain.ADDS_CODES, ops_chain.CONVOLUTION_PLUS_CODES
_LINEAR_ACTIVATIONS = {NO_ACTIVATION: "none", epilogues.RELU: "relu", epilogues.GELU_ERF: "gelu"}
_LINEAR_ACTIVATIONS[epilogues.GELU_TANH] = "gelu_tanh"
_LAYERS = {1: IntegerConv1d, 2: IntegerConv2d, 3: IntegerConv3d}
_MANY_RESULTS = 1 << 17
"""From so many results on, activations that oneDNN fuses with few rows save more than a call of our operator costs."""
CONVOLUTIONS = tuple(known for known in onednn.CONVOLUTIONS.values() if known is not None)
_SCALE, _BIAS, _STRIDE, _GEOMETRY, _RESULT = 4, 6, 7, slice(7, 11), slice(11, 17)
"""Where oneDNN's convolution has its arguments."""


def calls(graph: Graph, targets: Sequence[Any]) -> list[Node]:
    """The nodes that call any of ``targets``, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def value_of(node: Any) -> Any:
    """The tensor without data that the tracer has seen at ``node``, ``None`` for anything else."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def bound(node: Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name, given positionally or not."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def hashable(argument: Any) -> Any:
    """An argument as part of a key."""
    return tuple(argument) if isinstance(argument, list) else argument


def plain_product(graph: Graph, codes: Any, columns: Any, after: tuple[Any, Any], sizes: tuple[int, list[Any]]) -> Node:
    """Torch's plain product, whose epilogue the compiler fuses with what follows.

    Args:
        graph: Where the nodes go.
        codes: The input, ``[..., k]``.
        columns: The weight, ``[k, n]``.
        after: Factor and bias.
        sizes: ``k``, and the shape of the result.
    """
    depth, shape = sizes
    rows = graph.call_method("reshape", (codes, -1, depth))
    one = all(size == 1 for size in shape[:-1])
    # Compilers choose strides of axes of size 1, and torch reads some single rows in a wrong order.
    product = graph.call_function(int_mm, (graph.call_method("repeat", (rows, 2, 1)) if one else rows, columns))
    product = graph.call_method("narrow", (product, 0, 0, 1)) if one else product
    y = graph.call_function(torch.addcmul, (after[1], product, after[0]))
    return graph.call_method("view", (y, *shape))


class Linear:
    """A linear layer of the program and what it has taken in."""

    smooths = True

    def __init__(self, node: Node) -> None:
        self.graph, self.operands, self.activation = node.graph, node.args[:4], NO_ACTIVATION
        value = value_of(node)
        shape = None if value is None else list(value.shape)
        static = shape is not None and all(type(size) is int for size in shape)
        rows = math.prod(shape[:-1]) if static else 0  # type: ignore[index]
        # Compilers choose strides of axes of size 1, and torch's plain product reads some single rows in a wrong order.
        self.few = shape if 1 < rows <= onednn.FEW_ROWS else None
        self.many = static and math.prod(shape) >= _MANY_RESULTS  # type: ignore[arg-type]
        self.generated = static and rows > 1 and is_tuned(node.args[1])

    def take(self, user: Node) -> bool:
        """Take in the operator ``user`` of the result so far, if the kernel can."""
        activation = activation_of(user)
        if self.generated or self.activation is not NO_ACTIVATION or activation not in _LINEAR_ACTIVATIONS:
            return False
        if self.few and activation is epilogues.RELU:
            return False
        self.activation = activation
        return True

    def codes(self, smoothing: Node | None, grid: tuple[Any, ...]) -> Node | None:
        """The result as codes on a grid, ``None`` if the compiler does better."""
        if self.generated or (self.few and (self._is_plain() or smoothing is not None)):
            return None
        arguments = (*self.operands, _LINEAR_ACTIVATIONS[self.activation], smoothing, *grid[:4])
        return self.graph.call_function(LINEAR_TO_CODES, arguments)

    def settle(self, node: Node, last: Node) -> None:
        """Compute floats; ``last`` is the operator taken in last."""
        plain = self._is_plain()
        replaced = node if plain else last
        with self.graph.inserting_before(replaced.next):
            if self.generated:
                replaced.replace_all_uses_with(self._generated())
            elif self.few and plain:
                replaced.replace_all_uses_with(self._multiplied(self.few))
            elif self.activation is not NO_ACTIVATION:
                name = _LINEAR_ACTIVATIONS[self.activation]
                replaced.replace_all_uses_with(self.graph.call_function(LINEAR, (*self.operands, name)))

    def _generated(self) -> Node:
        """The product of oneDNN, in place of which the compiler may put a kernel that computes what follows too."""
        codes, weight, factor, bias = self.operands
        call, operators = self.graph.call_function, torch.ops.onednn
        packed = call(operators.qlinear_prepack.default, (weight, None))
        # Of what depends on constants alone the compiler makes constants, but not of `torch.zeros`.
        zeros = self.graph.call_method("to", (call(torch.sub, (factor, factor)), torch.int64))
        floats: tuple[Any, ...] = 1.0, 0, torch.float32, "none", [], ""
        return call(operators.qlinear_pointwise.default, (codes, 1.0, 0, packed, factor, zeros, bias, *floats))

    def _is_plain(self) -> bool:
        """Whether torch's plain product and what the compiler makes of the rest take less than our operator."""
        return bool(self.few) and (self.activation is NO_ACTIVATION or not self.many)

    def _multiplied(self, shape: list[int]) -> Node:
        codes, weight, factor, bias = self.operands
        columns = self.graph.call_method("t", (weight,))
        return plain_product(self.graph, codes, columns, (factor, bias), (value_of(weight).shape[1], shape))


def is_tuned(weight: Any) -> bool:
    """Whether Inductor takes a weight for a constant, and tries kernels of its own making for products with it."""
    from torch._inductor import config

    tunes = config.max_autotune or config.max_autotune_gemm
    frozen = config.freezing and not torch.is_grad_enabled()  # Dynamo puts what it freezes into the program
    return bool(tunes and frozen and isinstance(weight, Node) and weight.op == "get_attr")


class Convolution:
    """A convolution of the program and what it has taken in."""

    smooths = False

    def __init__(self, node: Node) -> None:
        self.graph, self.target = node.graph, node.target
        self.arguments: list[Any] = list(node.args)
        self.fusible = _LAYERS[len(self.arguments[_STRIDE])]._fusible
        self.activation = NO_ACTIVATION
        self.norm: dict[str, Any] | None = None
        self.squeezes: list[Node] = []

    def take(self, user: Node) -> bool:
        if self.activation is not NO_ACTIVATION:
            return False
        if user.target == "squeeze" and user.args[1:] == (2,):  # which makes one dimension of two
            self.squeezes.append(user)
            return True
        if user.target is F.batch_norm and self.norm is None:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            norm = {"eps": 1e-5, "training": False, "weight": None, "bias": None, **bound(user, *names)}
            if norm["training"] or norm["running_mean"] is None:
                return False
            self.norm = norm
            return True
        activation = activation_of(user)
        if activation is None or activation.name not in self.fusible:
            return False
        self.activation = activation
        return True

    def codes(self, smoothing: Node | None, grid: tuple[Any, ...]) -> Node | None:
        *_, highest, known = grid
        if smoothing is not None or not known or not onednn.traces_codes():
            return None
        step, zero_point, activation = self.stored(*known)
        self.arguments[_RESULT] = (
            step, zero_point, torch.uint8, activation.name, arguments(activation), activation.algorithm
        )  # fmt: skip
        result = self.graph.call_function(self.target, tuple(self.arguments))  # type: ignore[arg-type]
        for squeeze in self.squeezes:
            result = self.graph.node_copy(squeeze, lambda node, result=result: result)  # type: ignore[misc]
        return result if highest == LEVELS - 1 else self.graph.call_method("clamp", (result, 0, highest))

    def plus(self, weight: Node, addend: tuple[Node, Sequence[float]], grid: tuple[Any, ...]) -> Node:
        """The codes on ``grid`` of this product, by the plain ``weight``, plus an addend: its codes and their grid."""
        *_, highest, known = grid
        added, (added_step, added_zero_point) = addend
        step, zero_point, activation = self.stored(*known)
        codes, input_step, *_ = self.arguments
        operands = codes, weight, input_step, self.arguments[_SCALE], self.arguments[_BIAS]
        sum_of = *self.arguments[_GEOMETRY], activation.name, added, added_step * step / known[0], int(added_zero_point)
        return self.graph.call_function(PLUS_CODES, (*operands, *sum_of, step, zero_point, highest))

    def stored(self, step: float, zero_point: float) -> tuple[float, int, Activation]:
        """What the kernel is told of its results, as in eager mode (``onednn.stored``): the unit grid if possible."""
        if self.norm is not None:
            self._fold(self.norm)
        if self.activation is not NO_ACTIVATION and (self.activation is not epilogues.RELU or zero_point):
            return step, int(zero_point), self.activation
        scale, bias = self.arguments[_SCALE], self.arguments[_BIAS]
        self.arguments[_SCALE] = self._call(operator.truediv, scale, step)
        if bias is not None or zero_point:
            bias = self._call(torch.zeros_like, scale) if bias is None else self._call(operator.truediv, bias, step)
            self.arguments[_BIAS] = self._call(operator.add, bias, zero_point)
        return 1.0, 0, NO_ACTIVATION

    def settle(self, node: Node, last: Node) -> None:
        """What follows a convolution in floats is left to the compiler."""

    def _fold(self, norm: dict[str, Any]) -> None:
        """Put a batch normalization into scale and bias."""
        call = self._call
        scale, bias, mean = self.arguments[_SCALE], self.arguments[_BIAS], norm["running_mean"]
        gain = call(torch.rsqrt, call(operator.add, norm["running_var"], norm["eps"]))
        gain = gain if norm["weight"] is None else call(operator.mul, gain, norm["weight"])
        shift = call(operator.neg, mean) if bias is None else call(operator.sub, bias, mean)
        shift = call(operator.mul, shift, gain)
        shift = shift if norm["bias"] is None else call(operator.add, shift, norm["bias"])
        self.arguments[_SCALE], self.arguments[_BIAS] = call(operator.mul, scale, gain), shift

    def _call(self, function: Callable[..., Any], *operands: Any) -> Node:
        return self.graph.call_function(function, operands)


def activation_of(node: Node) -> Activation | None:
    """The activation that a node computes of its first argument."""
    make = _ACTIVATIONS.get(node.target)
    return None if make is None else make(bound(node, "input", "first", "second"))


def _of(activation: Activation) -> Callable[[dict[str, Any]], Activation]:
    return lambda _: activation


_ACTIVATIONS: dict[Any, Callable[[dict[str, Any]], Activation | None]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _of(epilogues.RELU)),
    F.relu6: _of(epilogues.hardtanh(0.0, 6.0)),
    F.hardtanh: lambda a: epilogues.hardtanh(
        float(a.get("first", a.get("min_val", -1.0))), float(a.get("second", a.get("max_val", 1.0)))
    ),
    F.gelu: lambda a: epilogues.GELU_TANH if a.get("approximate") == "tanh" else epilogues.GELU_ERF,
    F.silu: _of(epilogues.SILU),
    F.hardswish: _of(epilogues.HARDSWISH),
}

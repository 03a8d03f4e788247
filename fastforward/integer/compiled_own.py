"""Products of a module's own code in a compiled program: their spellings, and the integers that they multiply by."""

import dataclasses
import operator
from typing import Any

import torch
from fastforward_kernels import ops_chain
from fastforward_kernels.int_mm import TAKES_UINT8
from torch.fx import Graph, Node

from fastforward.integer.compiled_products import LINEAR, bound, plain_product, value_of

F = torch.nn.functional
WEIGHT, SUMS = ops_chain.WEIGHT_OF_INTEGERS, ops_chain.CHANNEL_SUMS
_SPELLINGS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((torch.matmul, operator.matmul, "matmul"), ("input", "other")),
    **dict.fromkeys((torch.mm, "mm"), ("input", "mat2")),
    **dict.fromkeys((torch.addmm, "addmm"), ("input", "mat1", "mat2")),
}
"""What multiplies by a matrix, functions and methods, and the names of its operands."""
_TURNS = frozenset(
    {*("t", "transpose", "permute", "swapaxes"), *(torch.t, torch.transpose, torch.permute, torch.swapaxes), getattr}
)
"""What may transpose a matrix; ``getattr`` reads ``T``."""


@dataclasses.dataclass
class OwnProduct:
    """A product by integers.

    Attributes:
        node: The operator.
        input: What it multiplies.
        bias: What it adds, ``[n]``, or ``None``.
        weight: The node that makes floats of the integers.
        turns: Transpositions between that and the operator, the last first.
        axis: The axis of the integers that is ``n``.
    """

    node: Node
    input: Any
    bias: Any
    weight: Node
    turns: list[Node]
    axis: int

    @property
    def channels(self) -> int:
        """The number of output channels."""
        return int(value_of(self.weight).shape[self.axis])

    @property
    def is_packed(self) -> bool:
        """Whether oneDNN keeps the weight packed, with its tensor; a computed one would be packed in each call."""
        return self.axis == 0 and self.weight.args[0].op in ("placeholder", "get_attr")  # type: ignore[union-attr]

    def multiplied(self, codes: Node, step: Any, zero_point: Any) -> Node:
        """The product of codes on the grid of ``step`` and ``zero_point``, in place of the operator."""
        graph, (integers, scale) = self.node.graph, self.weight.args
        factor = graph.call_function(operator.mul, (graph.call_method("reshape", (scale, -1)), step))
        factor = graph.call_method("expand", (factor, self.channels))
        shift = graph.call_function(operator.mul, (graph.call_function(SUMS, (integers, 1 - self.axis)), zero_point))
        negative = graph.call_function(operator.neg, (graph.call_function(operator.mul, (shift, factor)),))
        bias = negative if self.bias is None else graph.call_function(operator.add, (negative, self.bias))
        if self.is_packed:
            return graph.call_function(LINEAR, (codes, integers, factor, bias, "none"))
        columns = graph.call_method("t", (integers,)) if self.axis == 0 else integers
        sizes = value_of(self.weight).shape[1 - self.axis], _sizes(graph, value_of(self.node), codes)
        return plain_product(graph, codes, columns, (factor, bias), sizes)


def is_spelled(node: Node) -> bool:
    """Whether a node multiplies by a matrix."""
    return node.op in ("call_function", "call_method") and node.target in _SPELLINGS


def own_product(node: Node) -> OwnProduct | None:
    """The product that ``node`` computes; ``None`` if its weight has no integers with one scale per channel."""
    names = _SPELLINGS[node.target]
    if set(node.kwargs) - set(names) or value_of(node) is None:  # factors, or a place for the result
        return None
    given = bound(node, *names)
    operands = [given.get(name) for name in names]
    by_rows = node.target is F.linear
    input, weight, bias = operands if by_rows else (*operands[-2:], operands[-3] if len(operands) > 2 else None)
    weight, turns = _behind_turns(weight)
    if not isinstance(weight, Node) or weight.target is not WEIGHT:
        return None
    product = OwnProduct(node, input, bias, weight, turns, (len(turns) + (not by_rows)) % 2)
    # Where torch's plain product takes no uint8, it needs sums of the weight that torch 2.6 cannot compile.
    return product if _is_per_channel(product) and (product.is_packed or TAKES_UINT8) else None


def _is_per_channel(product: OwnProduct) -> bool:
    """Whether scale and bias have one number per output channel, the scale perhaps one for all."""
    scale, bias = value_of(product.weight.args[1]), value_of(product.bias)
    if product.bias is not None and (bias is None or tuple(bias.shape) != (product.channels,)):
        return False
    shapes = ((1, 1), (product.channels, 1) if product.axis == 0 else (1, product.channels))
    return scale is not None and tuple(scale.shape) in shapes


def _behind_turns(x: Any) -> tuple[Any, list[Node]]:
    """Where a matrix comes from through transpositions, and these, the last first."""
    turns = []
    while isinstance(x, Node) and x.target in _TURNS and _turns(value_of(x), value_of(x.args[0])):
        turns.append(x)
        x = x.args[0]
    return x, turns


def _turns(after: Any, before: Any) -> bool:
    if after is None or before is None or before.dim() != 2:
        return False
    return (after.shape, after.stride()) == (before.shape[::-1], before.stride()[::-1])


def _sizes(graph: Graph, result: torch.Tensor, codes: Node) -> list[Any]:
    """The shape of ``result``, whose sizes are those of ``codes`` but for the last, as arguments of an operator."""
    sizes = list(result.shape)
    return [size if type(size) is int else graph.call_method("size", (codes, axis)) for axis, size in enumerate(sizes)]

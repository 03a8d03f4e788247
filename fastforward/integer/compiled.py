"""What compiled programs fuse: integer layers in a program of ``torch.compile`` hand codes to each other.

While a compiler traces, a layer says what it computes in few operators: rounding to codes, product, floats. Before the
compiler takes these apart, :func:`fuse` goes over the program and lets a product take in the batch normalization,
activation and rounding that follow it, just as deferred results do in eager mode (``fusion``). Roundings move ahead of
views, so that a product sees them, and attention takes codes. Roundings that nobody takes in become elementwise
operators, which the compiler fuses with whatever surrounds them.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastforward_kernels import ops_chain
from fastforward_kernels.cpu_attention import multiplies_bfloat16
from fastforward_kernels.int_mm import int_mm
from torch.fx import Graph, Node

from fastforward.integer import epilogue as epilogues
from fastforward.integer import onednn
from fastforward.integer.conv import IntegerConv1d, IntegerConv2d, IntegerConv3d
from fastforward.integer.epilogue import NO_ACTIVATION, Activation, arguments
from fastforward.integer.grid import LEVELS

F = torch.nn.functional
ROUND, ON_GRID = ops_chain.ROUND_TO_CODES, ops_chain.ROUND_TO_GRID
ATTENTION = ops_chain.ATTENTION_OF_INTEGERS
LINEAR, LINEAR_TO_CODES = ops_chain.LINEAR_TO_FLOATS, ops_chain.LINEAR_TO_CODES
_MOVES = frozenset(
    {"view", "reshape", "flatten", "transpose", "permute", torch.flatten, torch.transpose, torch.permute}
)
"""Operators that keep every value: functions, and names of methods."""
_FEW_SCORES = 1 << 19
"""Attention of so few scores takes less in floats: a call of our operator costs more than a narrower type saves."""
_LINEAR_ACTIVATIONS = {NO_ACTIVATION: "none", epilogues.RELU: "relu", epilogues.GELU_ERF: "gelu"}
_LINEAR_ACTIVATIONS[epilogues.GELU_TANH] = "gelu_tanh"
_LAYERS = {1: IntegerConv1d, 2: IntegerConv2d, 3: IntegerConv3d}
CONVOLUTIONS = tuple(known for known in onednn.CONVOLUTIONS.values() if known is not None)
_SCALE, _BIAS, _STRIDE, _RESULT = 4, 6, 7, slice(11, 17)
"""Where oneDNN's convolution has its arguments."""


def fuse(graph: Graph) -> None:
    """Let the integer layers of a program hand codes to each other, in place."""
    if not _calls(graph, (ROUND, ON_GRID)):
        return
    for node in _calls(graph, (F.scaled_dot_product_attention,)):
        _attend_to_integers(node)
    for node in _calls(graph, (ROUND,)):
        _move_ahead(node)
    for node in _calls(graph, (LINEAR,)):
        _take_in(node, _Linear(node))
    for node in _calls(graph, CONVOLUTIONS):
        _take_in(node, _Convolution(node))
    for node in _calls(graph, (ROUND, ON_GRID)):
        _take_apart(node)


def _calls(graph: Graph, targets: Sequence[Any]) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def _value(node: Any) -> Any:
    """The tensor without data that the tracer has seen at ``node``, ``None`` for anything else."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _bound(node: Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name, given positionally or not."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


# ---------------------------------------------------------------- roundings
def _move_ahead(rounding: Node) -> None:
    """Round before data is moved, where that lets a product store codes.

    Programs may still change tensors in place. So nobody else may see the values on the way, and they must be fresh.
    """
    moves = []
    source: Any = rounding.args[0]
    while isinstance(source, Node) and _moves(source) and len(source.users) == 1:
        moves.append(source)
        source = source.args[0]
    if (
        not moves
        or len(source.users) != 1
        or not _is_fresh(source)
        or any(_is_one_row(user) for user in rounding.users)
    ):
        return
    graph = rounding.graph
    with graph.inserting_before(rounding):
        codes = graph.call_function(ROUND, (source, *rounding.args[1:]))
        for move in reversed(moves):
            codes = graph.node_copy(move, lambda node, codes=codes: codes)  # type: ignore[misc]
    rounding.replace_all_uses_with(codes)
    for node in (rounding, *moves):
        graph.erase_node(node)


def _is_one_row(node: Node) -> bool:
    """Whether a linear layer multiplies one row, which torch's plain product reads in a wrong order once moved."""
    value = _value(node)
    return node.target is LINEAR and value is not None and value.numel() == value.shape[-1]


def _is_fresh(node: Node) -> bool:
    """Whether a node's result is no view of anything."""
    return node.target in (LINEAR, *CONVOLUTIONS, F.batch_norm) or _activation(node) is not None


def _moves(node: Node) -> bool:
    if node.target is F.dropout:
        return _bound(node, "input", "p", "training").get("training") is False
    return node.target in _MOVES and bool(node.args) and isinstance(node.args[0], Node)


def _take_apart(rounding: Node) -> None:
    """Replace a rounding by elementwise operators."""
    graph = rounding.graph
    x, step, inverse, zero_point, highest = rounding.args[:5]
    with graph.inserting_before(rounding):
        scaled = graph.call_function(operator.mul, (x, inverse))
        shifted = graph.call_function(operator.add, (graph.call_function(torch.round, (scaled,)), zero_point))
        codes = graph.call_method("clamp", (shifted, 0, highest))
        if rounding.target is ROUND:
            floats = _become_floats(rounding)  # which codes are before they are bytes
            result = codes if floats else graph.call_method("to", (codes, torch.uint8))
        else:
            result = graph.call_function(operator.mul, (graph.call_function(operator.sub, (codes, zero_point)), step))
    rounding.replace_all_uses_with(result)
    graph.erase_node(rounding)


def _become_floats(codes: Node) -> bool:
    """Whether codes are only ever converted to floats."""
    return all(_become_floats(user) if _moves(user) else _converts_to_floats(user) for user in codes.users)


def _converts_to_floats(node: Node) -> bool:
    dtype = node.args[1] if node.target == "to" and len(node.args) > 1 else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


# ---------------------------------------------------------------- products
class _Linear:
    """A linear layer of the program and what it has taken in."""

    smooths = True

    def __init__(self, node: Node) -> None:
        self.graph, self.operands, self.activation = node.graph, node.args[:4], NO_ACTIVATION
        value = _value(node)
        shape = None if value is None else list(value.shape)
        static = shape is not None and all(type(size) is int for size in shape)
        self.few = shape if static and math.prod(shape[:-1]) <= onednn.FEW_ROWS else None  # type: ignore[index]

    def take(self, user: Node) -> bool:
        """Take in the operator ``user`` of the result so far, if the kernel can."""
        activation = _activation(user)
        if self.activation is not NO_ACTIVATION or activation not in _LINEAR_ACTIVATIONS:
            return False
        if self.few and activation is epilogues.RELU:
            return False
        self.activation = activation
        return True

    def codes(self, smoothing: Node | None, grid: tuple[Any, ...]) -> Node | None:
        """The result as codes on a grid, ``None`` if the compiler does better."""
        if self.few and (self.activation is NO_ACTIVATION or smoothing is not None):
            return None
        arguments = (*self.operands, _LINEAR_ACTIVATIONS[self.activation], smoothing, *grid[:4])
        return self.graph.call_function(LINEAR_TO_CODES, arguments)

    def settle(self, node: Node, last: Node) -> None:
        """Compute floats; ``last`` is the operator taken in last."""
        replaced = node if self.few else last
        with self.graph.inserting_before(replaced.next):
            if self.few:
                replaced.replace_all_uses_with(self._multiplied(self.few))
            elif self.activation is not NO_ACTIVATION:
                name = _LINEAR_ACTIVATIONS[self.activation]
                replaced.replace_all_uses_with(self.graph.call_function(LINEAR, (*self.operands, name)))

    def _multiplied(self, shape: list[int]) -> Node:
        """Torch's plain product, whose epilogue the compiler fuses with what follows."""
        codes, weight, factor, bias = self.operands
        rows = self.graph.call_method("reshape", (codes, -1, _value(weight).shape[1]))
        product = self.graph.call_function(int_mm, (rows, self.graph.call_method("t", (weight,))))
        y = self.graph.call_function(torch.addcmul, (bias, product, factor))
        return self.graph.call_method("view", (y, *shape))


class _Convolution:
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
            norm = {"eps": 1e-5, "training": False, "weight": None, "bias": None, **_bound(user, *names)}
            if norm["training"] or norm["running_mean"] is None:
                return False
            self.norm = norm
            return True
        activation = _activation(user)
        if activation is None or activation.name not in self.fusible:
            return False
        self.activation = activation
        return True

    def codes(self, smoothing: Node | None, grid: tuple[Any, ...]) -> Node | None:
        *_, highest, known = grid
        if smoothing is not None or not known:
            return None
        scale, zero_point = known
        if self.norm is not None:
            self._fold(self.norm)
        name, algorithm = self.activation.name, self.activation.algorithm
        self.arguments[_RESULT] = (
            scale, int(zero_point), torch.uint8, name, arguments(self.activation), algorithm
        )  # fmt: skip
        result = self.graph.call_function(self.target, tuple(self.arguments))  # type: ignore[arg-type]
        for squeeze in self.squeezes:
            result = self.graph.node_copy(squeeze, lambda node, result=result: result)  # type: ignore[misc]
        return result if highest == LEVELS - 1 else self.graph.call_method("clamp", (result, 0, highest))

    def settle(self, node: Node, last: Node) -> None:
        """What follows a convolution in floats is left to the compiler."""

    def _fold(self, norm: dict[str, Any]) -> None:
        """Put a batch normalization into scale and bias."""

        def call(function: Callable[..., Any], *operands: Any) -> Node:
            return self.graph.call_function(function, operands)

        scale, bias = self.arguments[_SCALE], self.arguments[_BIAS]
        gain = call(torch.rsqrt, call(operator.add, norm["running_var"], norm["eps"]))
        gain = gain if norm["weight"] is None else call(operator.mul, gain, norm["weight"])
        shift = (
            call(operator.neg, norm["running_mean"]) if bias is None else call(operator.sub, bias, norm["running_mean"])
        )
        shift = call(operator.mul, shift, gain)
        shift = shift if norm["bias"] is None else call(operator.add, shift, norm["bias"])
        self.arguments[_SCALE], self.arguments[_BIAS] = call(operator.mul, scale, gain), shift


def _take_in(node: Node, product: Any) -> None:
    """Let a product take in what follows it: operators one by one, then the rounding of their result."""
    taken = [node]
    while len(taken[-1].users) == 1 and product.take(user := next(iter(taken[-1].users))):
        taken.append(user)
    last = taken[-1]
    factor, wanted = (_smoothing(last) if product.smooths else None) or (None, last)
    if not _store_codes(product, factor, wanted):
        product.settle(node, last)
    # Nodes that nobody uses are not erased otherwise: what they do may be to change something in place.
    for old in dict.fromkeys((wanted, *reversed(taken))):
        if not old.users:
            node.graph.erase_node(old)


def _store_codes(product: Any, factor: Node | None, wanted: Node) -> bool:
    """Let a product store codes if all that is wanted of ``wanted`` is its rounding to one grid."""
    roundings = list(wanted.users)
    grids = {tuple(map(_hashable, user.args[1:])) for user in roundings if user.target is ROUND}
    if len(grids) != 1 or not all(user.target is ROUND for user in roundings):
        return False
    with wanted.graph.inserting_before(roundings[0]):
        codes = product.codes(factor, grids.pop())
    if codes is None:
        return False
    for rounding in roundings:
        rounding.replace_all_uses_with(codes)
        wanted.graph.erase_node(rounding)
    return True


def _hashable(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, list) else argument


def _smoothing(last: Node) -> tuple[Node, Node] | None:
    """The factor per channel that follows ``last`` before it is rounded, and their product."""
    scaled = next(iter(last.users)) if len(last.users) == 1 else None
    if scaled is None or scaled.target is not operator.mul or scaled.args[0] is not last:
        return None
    factor, value = scaled.args[1], _value(last)
    per_channel = _value(factor)
    if (
        per_channel is None
        or value is None
        or per_channel.shape != value.shape[-1:]
        or per_channel.dtype != value.dtype
    ):
        return None
    return factor, scaled  # type: ignore[return-value]


def _activation(node: Node) -> Activation | None:
    """The activation that a node computes of its first argument."""
    make = _ACTIVATIONS.get(node.target)
    return None if make is None else make(_bound(node, "input", "first", "second"))


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


# ---------------------------------------------------------------- attention
def _attend_to_integers(node: Node) -> None:
    """Attention on the whole numbers that its rounded operands stand for, with their steps in the softmax's scale.

    bfloat16 holds them exactly; where the processor multiplies that by tiles, only probabilities are rounded.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    bound = _bound(node, *names)
    operands: list[Any] = [bound.get(name) for name in names[:3]]
    query = _value(operands[0])
    if query is None or query.dim() != 4 or query.dtype != torch.float32 or bound.get("dropout_p"):
        return
    if bound.get("enable_gqa") or not all(isinstance(x, Node) and x.target is ON_GRID for x in operands):
        return
    scores, scale, graph = _scores(query, _value(operands[1])), bound.get("scale"), node.graph
    width = query.shape[-1]
    if (scale is None and type(width) is not int) or (scores is not None and scores < _FEW_SCORES):
        return
    scale = 1 / math.sqrt(width) if scale is None else scale
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    with graph.inserting_before(node):
        integers = [_integers(graph, x, dtype) for x in operands]
        steps = [x.args[1] for x in operands]
        after = (_additive(bound.get("attn_mask")), bool(bound.get("is_causal")), scale)
        attended = graph.call_function(ATTENTION, (*integers, *steps[:2], *after))
        result = graph.call_method("to", (attended, torch.float32)) if dtype != torch.float32 else attended
        result = graph.call_function(operator.mul, (result, steps[2]))
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    for x in dict.fromkeys(operands):
        if not x.users:
            graph.erase_node(x)


def _scores(query: torch.Tensor, key: torch.Tensor) -> int | None:
    """The number of scores, ``None`` if it depends on the input."""
    sizes = (*query.shape[:3], key.shape[2])
    return math.prod(sizes) if all(type(size) is int for size in sizes) else None


def _integers(graph: Graph, rounding: Node, dtype: torch.dtype) -> Node:
    """The codes of a rounded operand less their zero point."""
    codes = graph.call_function(ROUND, (*rounding.args, ()))
    return graph.call_function(operator.sub, (graph.call_method("to", (codes, dtype)), rounding.args[3]))


def _additive(mask: Node | None) -> Node | None:
    """A mask to be added to scores: compilers store truth values slowly."""
    value = _value(mask)
    if mask is None or value is None or value.dtype != torch.bool:
        return mask
    return mask.graph.call_function(torch.where, (mask, 0.0, -math.inf))

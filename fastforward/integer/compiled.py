"""What compiled programs fuse: integer layers in a program of ``torch.compile`` hand codes to each other.

While a compiler traces, a layer says what it computes in few operators: rounding to codes, product, floats. Before the
compiler takes these apart, :func:`fuse` goes over the program and lets a product take in the batch normalization,
activation and rounding that follow it, just as deferred results do in eager mode (``fusion``). Roundings move ahead of
views, so that a product sees them, and attention takes codes. Roundings that nobody takes in become elementwise
operators, which the compiler fuses with whatever surrounds them.
"""

import math
import operator
from typing import Any

import torch
from fastforward_kernels import ops_chain
from fastforward_kernels.cpu_attention import multiplies_bfloat16
from torch.fx import Graph, Node

from fastforward.integer.compiled_own import WEIGHT, is_spelled, own_product
from fastforward.integer.compiled_products import (
    CONVOLUTIONS,
    LINEAR,
    ROUND,
    Convolution,
    Linear,
    activation_of,
    bound,
    calls,
    hashable,
    value_of,
)
from fastforward.integer.compiled_sums import POOLING, add_codes, is_private

F = torch.nn.functional
ON_GRID, ATTENTION = ops_chain.ROUND_TO_GRID, ops_chain.ATTENTION_OF_INTEGERS
_MOVES = frozenset(
    {
        *("view", "reshape", "flatten", "transpose", "permute", "contiguous", "roll"),
        *(torch.flatten, torch.transpose, torch.permute, torch.roll),
    }
)
"""Operators that keep every value: functions, and names of methods."""
_DETACHING = frozenset({"detach", torch.detach})
_POOLING_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_FEW_SCORES = {torch.float32: 1 << 19, torch.bfloat16: 1 << 17}
"""Attention of fewer scores takes less in floats: a call of our operator costs more than going by codes saves."""


def fuse(graph: Graph) -> None:
    """Let the integer layers of a program hand codes to each other, in place."""
    if not calls(graph, (ROUND, ON_GRID, WEIGHT)):
        return
    for node in calls(graph, (ROUND,)):
        _take_in_detaching(node)
    for node in calls(graph, (F.scaled_dot_product_attention,)):
        _attend_to_integers(node)
    for node in [node for node in graph.nodes if is_spelled(node)]:
        _multiply_integers(node)
    add_codes(graph)
    for node in calls(graph, (ROUND,)):
        _move_ahead(node)
    for node in calls(graph, (LINEAR,)):
        _take_in(node, Linear(node))
    for node in calls(graph, CONVOLUTIONS):
        _take_in(node, Convolution(node))
    for node in calls(graph, (ROUND, ON_GRID)):
        _take_apart(node)
    for node in calls(graph, (WEIGHT,)):
        _make_real(node)


# ---------------------------------------------------------------- roundings
def _take_in_detaching(rounding: Node) -> None:
    """Round what a model with gradients detaches first, before its channels are scaled or not: codes carry none."""
    before: Any = rounding.args[0]
    is_scaled = isinstance(before, Node) and before.target is operator.mul and len(before.users) == 1
    place = before if is_scaled else rounding
    detached = place.args[0]
    if isinstance(detached, Node) and detached.target in _DETACHING:
        place.update_arg(0, detached.args[0])
        if not detached.users:
            detached.graph.erase_node(detached)


def _move_ahead(rounding: Node) -> None:
    """Round before data is moved, where that lets a product store codes.

    Programs may still change tensors in place. So nobody else may see the values on the way, and they must be fresh.
    """
    source, moves = _behind_moves(rounding.args[0])
    if not moves or len(source.users) != 1 or not _is_fresh(source):
        return
    graph = rounding.graph
    with graph.inserting_before(rounding):
        codes = graph.call_function(ROUND, (source, *rounding.args[1:]))
        for move in reversed(moves):
            codes = _moved(move, codes)
    rounding.replace_all_uses_with(codes)
    for node in (rounding, *moves):
        graph.erase_node(node)


def _behind_moves(x: Any) -> tuple[Any, list[Node]]:
    """Where ``x`` comes from through moves whose results nobody else sees, and these, the last first."""
    moves = []
    while isinstance(x, Node) and _moves(x) and len(x.users) == 1:
        moves.append(x)
        x = x.args[0]
    return x, moves


def _moved(move: Node, codes: Node) -> Node:
    """The codes that ``move`` moves."""
    if move.target not in POOLING:
        return codes.graph.node_copy(move, lambda node: codes if node is move.args[0] else node)  # others are sizes
    # The operator that eager mode takes (``fusion``).
    return codes.graph.call_function(torch.ops.quantized.max_pool2d, (codes, *_window(move), False))


def _window(pooling: Node) -> list[list[int]]:
    """Kernel, stride, padding and dilation of a pooling."""
    given = {"padding": 0, "dilation": 1, **bound(pooling, *_POOLING_ARGUMENTS)}
    sizes = [given["kernel_size"], given.get("stride") or given["kernel_size"], given["padding"], given["dilation"]]
    return [list(size) if isinstance(size, list | tuple) else [size, size] for size in sizes]


def _is_fresh(node: Node) -> bool:
    """Whether a node's result is no view of anything."""
    return node.target in (LINEAR, *CONVOLUTIONS, F.batch_norm) or activation_of(node) is not None


def _moves(node: Node) -> bool:
    if node.target in POOLING:
        given, value = bound(node, *_POOLING_ARGUMENTS), value_of(node)
        plain = not given.get("ceil_mode") and not given.get("return_indices")
        return plain and value is not None and value.dim() == 4 and is_private(node)
    if node.target is F.dropout:
        return bound(node, "input", "p", "training").get("training") is False
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
            result = graph.call_method("detach", (codes,)) if floats else graph.call_method("to", (codes, torch.uint8))
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
def _multiply_integers(node: Node) -> None:
    """Let an operator in a module's own code multiply codes by the integers that its weight stands for."""
    own, graph = own_product(node), node.graph
    if own is None:
        return
    rounding, moves = _behind_moves(own.input)
    if not isinstance(rounding, Node) or rounding.target is not ON_GRID or not _is_as_rounded(rounding, node):
        return
    with graph.inserting_before(rounding):  # what it rounds may change later on
        codes = graph.call_function(ROUND, (*rounding.args, ()))
    with graph.inserting_before(node):
        for move in reversed(moves):
            codes = _moved(move, codes)
        product = own.multiplied(codes, rounding.args[1], rounding.args[3])
    product.meta["example_value"] = value_of(node)
    node.replace_all_uses_with(product)
    for old in (node, *moves, rounding, *own.turns, own.weight):
        if not old.users:
            graph.erase_node(old)


def _is_as_rounded(rounding: Node, product: Node) -> bool:
    """Whether nobody can have changed the values of a rounding before a product takes them."""
    users = list(rounding.users)
    return len(users) == 1 or all(is_spelled(user) or product < user for user in users)


def _make_real(weight: Node) -> None:
    """Compute the floats of a weight whose product has no integer form."""
    with weight.graph.inserting_before(weight):
        weight.replace_all_uses_with(weight.graph.call_function(operator.mul, weight.args))
    weight.graph.erase_node(weight)


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
    grids = {tuple(map(hashable, user.args[1:])) for user in roundings if user.target is ROUND}
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


def _smoothing(last: Node) -> tuple[Node, Node] | None:
    """The factor per channel that follows ``last`` before it is rounded, and their product."""
    scaled = next(iter(last.users)) if len(last.users) == 1 else None
    if scaled is None or scaled.target is not operator.mul or scaled.args[0] is not last:
        return None
    factor, value = scaled.args[1], value_of(last)
    per_channel = value_of(factor)
    if (
        per_channel is None
        or value is None
        or per_channel.shape != value.shape[-1:]
        or per_channel.dtype != value.dtype
    ):
        return None
    return factor, scaled  # type: ignore[return-value]


# ---------------------------------------------------------------- attention
def _attend_to_integers(node: Node) -> None:
    """Attention on the whole numbers that its rounded operands stand for, with their steps in the softmax's scale.

    bfloat16 holds them exactly; where the processor multiplies that by tiles, only probabilities are rounded.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = bound(node, *names)
    operands: list[Any] = [given.get(name) for name in names[:3]]
    query = value_of(operands[0])
    if query is None or query.dim() != 4 or query.dtype != torch.float32 or given.get("dropout_p"):
        return
    if given.get("enable_gqa") or not all(isinstance(x, Node) and x.target is ON_GRID for x in operands):
        return
    scores, scale, graph = _scores(query, value_of(operands[1])), given.get("scale"), node.graph
    width = query.shape[-1]
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    if (scale is None and type(width) is not int) or (scores is not None and scores < _FEW_SCORES[dtype]):
        return
    scale = 1 / math.sqrt(width) if scale is None else scale
    with graph.inserting_before(node):
        integers = [_integers(graph, x, dtype) for x in operands]
        steps = [x.args[1] for x in operands]
        after = (_additive(given.get("attn_mask")), bool(given.get("is_causal")), scale)
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
    value = value_of(mask)
    if mask is None or value is None or value.dtype != torch.bool:
        return mask
    return mask.graph.call_function(torch.where, (mask, 0.0, -math.inf))

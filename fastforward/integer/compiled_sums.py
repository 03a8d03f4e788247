"""Residual sums of a compiled program: convolutions add the codes of what others make, as in eager mode (``residual``).

A layer that found there that codes are exact enough says so in the program (``ADDS_CODES``). Its sum takes codes where
nobody wants the floats of the addend or of the sum: all that becomes of them are codes on one grid, and more such sums.
"""

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from fastforward.integer import epilogue as epilogues
from fastforward.integer.compiled_products import (
    ADDS_CODES,
    CONVOLUTIONS,
    ROUND,
    Convolution,
    activation_of,
    calls,
    hashable,
    value_of,
)
from fastforward.integer.epilogue import NO_ACTIVATION
from fastforward.integer.grid import LEVELS

F = torch.nn.functional
_IN_PLACE = frozenset({operator.iadd, "add_"})
_ADDITIONS = frozenset({operator.add, torch.add, "add"}) | _IN_PLACE
POOLING = frozenset({F.max_pool2d, torch.max_pool2d})


@dataclasses.dataclass(eq=False)
class _Sum:
    """A convolution whose result is added to something.

    Attributes:
        product: The convolution with what lies before the sum and after it.
        weight: Its plain weight.
        taken: The nodes that it takes in, from the convolution to the result.
        addition: The one that adds.
        addend: What is added.
    """

    product: Convolution
    weight: Any
    taken: list[Node]
    addition: Node
    addend: Node

    @property
    def result(self) -> Node:
        return self.taken[-1]


def add_codes(graph: Graph) -> None:
    """Let convolutions add codes."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    markers = calls(graph, (ADDS_CODES,))
    coded: list[_Sum] = []
    for found in filter(None, map(_sum_of, reversed(markers))):
        grids = _grid(found.result, coded), _grid(found.addend, [found, *coded])
        if None in grids or grids[1][-2] != LEVELS - 1 or not is_private(found.addend):  # type: ignore[index]
            continue
        if order[_roundings(found.addend)[0]] < order[_roundings(found.result)[0]]:
            coded.insert(0, found)
    stored = {found.addend: (rounding := _roundings(found.addend)[0], rounding.args[-1]) for found in coded}
    for found in coded:
        roundings = _roundings(found.result)
        grid = roundings[0].args[1:]
        with graph.inserting_before(roundings[0]):
            codes = found.product.plus(found.weight, stored[found.addend], grid)  # type: ignore[arg-type]
        stored[found.result] = codes, grid[-1]
        for rounding in roundings:
            rounding.replace_all_uses_with(codes)
            graph.erase_node(rounding)
    for old in (node for found in reversed(coded) for node in reversed(found.taken)):
        graph.erase_node(old)
    for marker in calls(graph, (ADDS_CODES,)):
        marker.replace_all_uses_with(marker.args[0])  # type: ignore[arg-type]
        graph.erase_node(marker)


def is_private(node: Any) -> bool:
    """Whether a convolution and what follows it make a value that nobody else can change in place."""
    while isinstance(node, Node) and node.target not in CONVOLUTIONS:
        follows = node.target in (ADDS_CODES, F.batch_norm, *_ADDITIONS, *POOLING) or activation_of(node) is not None
        if not follows or not isinstance(node.args[0], Node) or len(node.args[0].users) != 1:
            return False
        node = node.args[0]
    return isinstance(node, Node)


def _sum_of(marker: Node) -> _Sum | None:
    """The sum to which a marked convolution leads, if there is nothing else between them than it can take in."""
    convolution: Any = marker.args[0]
    if not isinstance(convolution, Node) or convolution.target not in CONVOLUTIONS or len(convolution.users) != 1:
        return None
    product, taken = Convolution(convolution), [convolution, marker]
    while (user := _only_user(taken[-1])) is not None and product.take(user):
        taken.append(user)
    if user is None or user.target not in _ADDITIONS or user.kwargs or product.activation is not NO_ACTIVATION:
        return None
    addends = [x for x in user.args if x is not taken[-1]]
    if len(user.args) != 2 or len(addends) != 1 or (user.target in _IN_PLACE and user.args[0] is not taken[-1]):
        return None
    one, other = value_of(taken[-1]), value_of(addends[0])
    if one is None or other is None or one.shape != other.shape or not one.dtype == other.dtype == torch.float32:
        return None
    found = _Sum(product, marker.args[1], [*taken, user], user, addends[0])  # type: ignore[arg-type]
    if (last := _only_user(user)) is not None and activation_of(last) is epilogues.RELU:
        product.activation = epilogues.RELU
        found.taken.append(last)
    return found


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _roundings(node: Node) -> list[Node]:
    return [user for user in node.users if user.target is ROUND]


def _grid(node: Node, sums: list[_Sum]) -> tuple[Any, ...] | None:
    """The grid on which ``node`` is rounded wherever it is not the addend of ``sums``; ``None`` if there is none."""
    roundings = _roundings(node)
    grids = {tuple(map(hashable, rounding.args[1:])) for rounding in roundings}
    added = {found.addition for found in sums if found.addend is node}
    if len(grids) != 1 or not all(user.target is ROUND or user in added for user in node.users):
        return None
    grid = grids.pop()
    return grid if grid[-1] else None

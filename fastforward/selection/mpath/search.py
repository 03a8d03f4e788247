"""Walk a module tree along a selector; quantizers count as children of the module that owns them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import torch

from fastforward.selection.mpath.collection import FilterResult, MPathCollection
from fastforward.selection.mpath.context import user_context
from fastforward.selection.mpath.parser import query as parse
from fastforward.selection.mpath.selectors import Selector

_Trace: TypeAlias = tuple[Selector, ...]
_States: TypeAlias = dict[Selector, _Trace]


def search(
    query: str | Selector,
    root: torch.nn.Module,
    *,
    aliases: Mapping[str, str | Selector] | None = None,
    root_aliases_attribute: str = "aliases",
) -> MPathCollection:
    """The modules below `root` whose path matches.

    Args:
        query: A query or a selector.
        root: Where paths start; the root itself is never a result.
        aliases: What ``&name`` stands for; they win over those of the root.
        root_aliases_attribute: An attribute of `root` with more aliases, a mapping.

    Returns:
        The matches in the order of the tree, each attribute of each module once.

    Raises:
        MPathParseError: The query does not follow the grammar.
    """
    known = {**_root_aliases(root, root_aliases_attribute), **(aliases or {})}
    selector = parse(query, context=user_context(), aliases=known)
    found = dict[tuple[int, str], FilterResult]()
    for result in _walk(root, "", {selector: ()}, (root,)):
        found.setdefault((id(result.parent), result.parent_attribute), result)
    return MPathCollection(root, found.values())


def children(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Child modules, then quantizers, by attribute name; a child held under two names appears twice."""
    for name, child in module._modules.items():
        if child is not None:
            yield name, child
    own_quantizers = getattr(module, "own_quantizers", None)
    if own_quantizers is not None:
        yield from own_quantizers().items()


def _root_aliases(root: torch.nn.Module, attribute: str) -> Mapping[str, str | Selector]:
    # Any model may have an attribute of that name that means something else.
    found = getattr(root, attribute, None)
    return found if isinstance(found, Mapping) else {}


def _walk(
    parent: torch.nn.Module, prefix: str, states: _States, ancestors: tuple[torch.nn.Module, ...]
) -> Iterator[FilterResult]:
    for name, child in children(parent):
        following = _advance(states.items(), name, child)
        full_name = f"{prefix}{name}"
        trace = next((trace for selector, trace in following.items() if selector.accepts_end), None)
        if trace is not None:
            yield FilterResult(full_name, child, parent, name, trace)
        if following and not any(child is ancestor for ancestor in ancestors):
            yield from _walk(child, f"{full_name}.", following, (*ancestors, child))


def _advance(states: Iterable[tuple[Selector, _Trace]], name: str, module: torch.nn.Module) -> _States:
    following = _States()
    for selector, trace in states:
        for consumer, remainder in selector.step(name, module):
            following.setdefault(remainder, (*trace, consumer))
    return following

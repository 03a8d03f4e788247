"""What a search found: results in the order of the tree, with the operations of a sequence and of a set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from typing_extensions import Self

from fastforward.exceptions import QuantizationError
from fastforward.selection.mpath.selectors import Selector

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class FilterResult:
    """One match.

    Attributes:
        full_name: Dotted path from the root of the search.
        module: The module found there.
        parent: The module that holds it.
        parent_attribute: Under which name.
        fragment_matches: For each level of the path, the part of the query that matched it.
    """

    full_name: str
    module: torch.nn.Module
    parent: torch.nn.Module
    parent_attribute: str
    fragment_matches: tuple[Selector, ...] = ()

    @property
    def key(self) -> tuple[int, str]:
        """What two results of the same attribute have in common."""
        return id(self.parent), self.parent_attribute

    def is_current(self) -> bool:
        """Whether the parent still holds this module under this name."""
        return getattr(self.parent, self.parent_attribute, None) is self.module


class MPathCollection(Sequence[FilterResult]):
    """Results of a search below one root, in the order of the tree.

    ``|``, ``&``, ``-`` and ``^`` combine collections of the same root.
    """

    def __init__(self, root: torch.nn.Module, results: Iterable[FilterResult] = ()) -> None:
        self.root = root
        self._results = list(results)

    def __len__(self) -> int:
        return len(self._results)

    @overload
    def __getitem__(self, index: int) -> FilterResult: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> FilterResult | Self:
        return self._with(self._results[index]) if isinstance(index, slice) else self._results[index]

    def __delitem__(self, index: int | slice) -> None:
        del self._results[index]

    def append(self, result: FilterResult) -> None:
        """Add one result, unless that attribute is already among them.

        Raises:
            TypeError: `result` is not a `FilterResult`.
        """
        if not isinstance(result, FilterResult):
            msg = f"expected a FilterResult, got {type(result).__name__}"
            raise TypeError(msg)
        if result.key not in self._keys():
            self._results.append(result)

    def full_names(self) -> list[str]:
        """Dotted paths of the results."""
        return [result.full_name for result in self]

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Pairs of dotted path and module."""
        return ((result.full_name, result.module) for result in self)

    def modules(self) -> Iterator[torch.nn.Module]:
        """The modules found."""
        return (result.module for result in self)

    def parents(self) -> Iterator[torch.nn.Module]:
        """The modules that hold them, each once."""
        return iter({id(result.parent): result.parent for result in self}.values())

    def map(self, function: Callable[[str, torch.nn.Module], _T]) -> list[_T]:
        """What ``function(full_name, module)`` returns for each result."""
        return [function(name, module) for name, module in self.named_modules()]

    def apply(
        self,
        function: Callable[[str, torch.nn.Module], torch.nn.Module | None],
        safe: bool = True,
        update: bool = True,
    ) -> Self:
        """Replace each module by what ``function(full_name, module)`` returns; None keeps it.

        A module found under several names is passed once and replaced everywhere, so shared modules stay shared.

        Args:
            function: The replacement for one module.
            safe: Refuse when the tree has changed since the search.
            update: Put the replacements into the model; otherwise only the returned collection holds them.

        Returns:
            A collection with the replacements.

        Raises:
            QuantizationError: `safe` is set and a parent no longer holds the module found.
        """
        if safe:
            self._require_current()
        replaced = list(self._replacements(function))
        if update:
            for result in replaced:
                setattr(result.parent, result.parent_attribute, result.module)
            self._results = replaced
        return self._with(replaced)

    def _replacements(
        self, function: Callable[[str, torch.nn.Module], torch.nn.Module | None]
    ) -> Iterator[FilterResult]:
        known = dict[int, torch.nn.Module]()
        for result in self:
            key = id(result.module)
            if key not in known:
                new = function(result.full_name, result.module)
                known[key] = result.module if new is None else new
            yield FilterResult(
                result.full_name, known[key], result.parent, result.parent_attribute, result.fragment_matches
            )

    def _require_current(self) -> None:
        stale = [result.full_name for result in self if not result.is_current()]
        if stale:
            msg = f"the model has changed since the search at {', '.join(stale)}; search again, or pass safe=False"
            raise QuantizationError(msg)

    def union(self, other: MPathCollection) -> Self:
        """The results of both, these first."""
        self._keys(other)
        known = self._keys()
        return self._with([*self, *(result for result in other if result.key not in known)])

    def intersection(self, other: MPathCollection) -> Self:
        """The results that are in both."""
        return self._filtered(other, keep_common=True)

    def difference(self, other: MPathCollection) -> Self:
        """The results that are not in `other`."""
        return self._filtered(other, keep_common=False)

    def symmetric_difference(self, other: MPathCollection) -> Self:
        """The results that are in one of the two only."""
        return self.difference(other).union(other.difference(self))

    def __or__(self, other: MPathCollection) -> Self:
        return self.union(other)

    def __and__(self, other: MPathCollection) -> Self:
        return self.intersection(other)

    def __sub__(self, other: MPathCollection) -> Self:
        return self.difference(other)

    def __xor__(self, other: MPathCollection) -> Self:
        return self.symmetric_difference(other)

    def __repr__(self) -> str:
        lines = "".join(f"\n  ({result.full_name}): {type(result.module).__name__}" for result in self)
        return f"{type(self).__name__}({len(self)} results{lines})"

    def _filtered(self, other: MPathCollection, keep_common: bool) -> Self:
        keys = self._keys(other)
        return self._with(result for result in self if (result.key in keys) == keep_common)

    def _keys(self, other: MPathCollection | None = None) -> set[tuple[int, str]]:
        if other is not None and other.root is not self.root:
            msg = "collections of different roots cannot be combined; search both from the same module"
            raise ValueError(msg)
        return {result.key for result in (self if other is None else other)}

    def _with(self, results: Iterable[FilterResult]) -> Self:
        return type(self)(self.root, results)

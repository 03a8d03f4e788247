"""Selectors: regular expressions whose letters are the levels of a module tree.

A selector reads a path one level at a time. `Selector.step` is given one level (attribute name and module) and
yields what consumed it and the selector for the levels that follow, as in Brzozowski's derivatives of regular
expressions (J. ACM 11, 1964). That makes sequences, alternatives, intersections and complements of whole paths
one mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

Step: TypeAlias = "tuple[Selector, Selector]"


class Selector:
    """A set of paths. Combine selectors with ``/`` (then), ``|`` (or), ``&`` (and) and ``~`` (not)."""

    @property
    def accepts_end(self) -> bool:
        """Whether the path may end here."""
        raise NotImplementedError

    def step(self, name: str, module: torch.nn.Module) -> Iterator[Step]:
        """Read one level.

        Args:
            name: The attribute's name in its parent.
            module: The module found there.

        Yields:
            The selector that consumed the level, and the selector for the rest of the path.
        """
        raise NotImplementedError

    def __truediv__(self, other: Selector | str) -> Selector:
        return sequence(self, as_selector(other))

    def __rtruediv__(self, other: str) -> Selector:
        return sequence(as_selector(other), self)

    def __or__(self, other: Selector | str) -> Selector:
        return Disjoint((self, as_selector(other)))

    def __and__(self, other: Selector | str) -> Selector:
        return Joint((self, as_selector(other)))

    def __invert__(self) -> Selector:
        return Inverted(self)


def as_selector(value: Selector | str) -> Selector:
    """A selector for an operand of ``/``, ``|`` or ``&``: a string is one level's name."""
    if isinstance(value, Selector):
        return value
    if isinstance(value, str):
        return Path(value)
    msg = f"expected a selector or a name, got {type(value).__name__}"
    raise TypeError(msg)


@dataclass(frozen=True)
class Empty(Selector):
    """The path of no levels."""

    @property
    def accepts_end(self) -> bool:
        return True

    def step(self, name: str, module: torch.nn.Module) -> Iterator[Step]:
        yield from ()


class Fragment(Selector):
    """A selector of exactly one level: subclasses implement `matches`."""

    @property
    def accepts_end(self) -> bool:
        return False

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        """Whether the level, an attribute `name` that holds `module`, is selected."""
        raise NotImplementedError

    def step(self, name: str, module: torch.nn.Module) -> Iterator[Step]:
        if self.matches(name, module):
            yield self, Empty()

    def __invert__(self) -> Selector:
        return InvertedFragment(self)


@dataclass(frozen=True)
class Wildcard(Fragment):
    """``*``: any one level."""

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        return True

    def __str__(self) -> str:
        return "*"


@dataclass(frozen=True)
class Path(Fragment):
    """A level of this exact name."""

    name: str

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        return name == self.name

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Predicate(Fragment):
    """A level for which a function ``(name, module) -> bool`` holds."""

    function: Callable[[str, torch.nn.Module], bool]

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        return bool(self.function(name, module))

    def __str__(self) -> str:
        return f"<{getattr(self.function, '__name__', 'predicate')}>"


@dataclass(frozen=True)
class InvertedFragment(Fragment):
    """``~fragment``: any one level that the fragment does not match."""

    fragment: Fragment

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        return not self.fragment.matches(name, module)

    def __invert__(self) -> Selector:
        return self.fragment

    def __str__(self) -> str:
        return f"~{self.fragment}"


@dataclass(frozen=True)
class AnyDepth(Selector):
    """``**``: any number of levels, none included."""

    @property
    def accepts_end(self) -> bool:
        return True

    def step(self, name: str, module: torch.nn.Module) -> Iterator[Step]:
        yield self, self

    def __str__(self) -> str:
        return "**"


@dataclass(frozen=True)
class Sequence(Selector):
    """``first/rest``: a path of `first` followed by one of `rest`."""

    first: Selector
    rest: Selector

    @property
    def accepts_end(self) -> bool:
        return self.first.accepts_end and self.rest.accepts_end

    def step(self, name: str, module: torch.nn.Module) -> Iterator[Step]:
        for consumer, remainder in self.first.step(name, module):
            yield consumer, sequence(remainder, self.rest)
        if self.first.accepts_end:
            yield from self.rest.step(name, module)

    def __str__(self) -> str:
        return f"{self.first}/{self.rest}"


@dataclass(frozen=True)
class Disjoint(Selector):
    """``{a, b}``: a path of any of the options."""

    options: tuple[Selector, ...]

    @property
    def accepts_end(self) -> bool:
        return any(option.accepts_end for option in self.options)

    def step(self, name: str, module: torch.nn.Module) -> Iterator[Step]:
        for option in self.options:
            yield from option.step(name, module)

    def __invert__(self) -> Selector:
        return _invert_group(self, self.options)

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.options)) + "}"


@dataclass(frozen=True)
class Joint(Selector):
    """``a & b``: a path of all of the parts."""

    parts: tuple[Selector, ...]

    @property
    def accepts_end(self) -> bool:
        return all(part.accepts_end for part in self.parts)

    def step(self, name: str, module: torch.nn.Module) -> Iterator[Step]:
        first, *others = self.parts
        for consumer, remainder in first.step(name, module):
            if not others:
                yield consumer, remainder
                continue
            for also, other_remainder in Joint(tuple(others)).step(name, module):
                yield Joint((consumer, also)), Joint((remainder, other_remainder))

    def __invert__(self) -> Selector:
        return _invert_group(self, self.parts)

    def __str__(self) -> str:
        return " & ".join(map(str, self.parts))


@dataclass(frozen=True)
class Inverted(Selector):
    """``~selector`` for whole paths: every path that the selector does not match."""

    selector: Selector

    @property
    def accepts_end(self) -> bool:
        return not self.selector.accepts_end

    def step(self, name: str, module: torch.nn.Module) -> Iterator[Step]:
        remainders = tuple(remainder for _, remainder in self.selector.step(name, module))
        yield self, Inverted(Disjoint(remainders))

    def __invert__(self) -> Selector:
        return self.selector

    def __str__(self) -> str:
        return f"~{self.selector}"


def sequence(*parts: Selector) -> Selector:
    """``a/b/c``, without the empty parts that reading a path leaves behind."""
    first, *others = parts
    if not others:
        return first
    rest = sequence(*others)
    if isinstance(first, Empty):
        return rest
    return first if isinstance(rest, Empty) else Sequence(first, rest)


def is_one_level(selector: Selector) -> bool:
    """Whether every path of the selector has exactly one level."""
    if isinstance(selector, Disjoint):
        return all(map(is_one_level, selector.options))
    if isinstance(selector, Joint):
        return any(map(is_one_level, selector.parts))
    return isinstance(selector, Fragment)


def _invert_group(group: Selector, members: tuple[Selector, ...]) -> Selector:
    # "not one of these levels" is still one level; a group of longer paths has only the complement over whole paths.
    return Joint((Wildcard(), Inverted(group))) if all(map(is_one_level, members)) else Inverted(group)

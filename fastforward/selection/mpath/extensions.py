"""The ``[TAG:text]`` fragments: by class, by regular expression, by quantizer tag, and those that users add."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastforward.selection.mpath.context import QueryContext
from fastforward.selection.mpath.errors import MPathParseError
from fastforward.selection.mpath.selectors import Fragment

_ExtensionT = TypeVar("_ExtensionT", bound=type)
_EXTENSIONS: dict[str, type[Any]] = {}


def register_mpath_query_extension(tag: str, cls: type[Any], override: bool = False) -> None:
    """Let queries say ``[tag:text]``.

    Args:
        tag: The word before the colon, an identifier.
        cls: A class with a class method ``from_raw_string(text)`` or ``from_raw_string_with_context(text, context)``
            that returns a `Fragment`.
        override: Replace an extension of the same tag.

    Raises:
        ValueError: The tag is no identifier, or taken.
        TypeError: `cls` has neither method.
    """
    if not tag.isidentifier():
        msg = f"extension tag {tag!r} is not an identifier"
        raise ValueError(msg)
    if tag in _EXTENSIONS and not override:
        msg = f"extension tag {tag!r} is taken by {_EXTENSIONS[tag].__name__}; pass override=True to replace it"
        raise ValueError(msg)
    if not (hasattr(cls, "from_raw_string") or hasattr(cls, "from_raw_string_with_context")):
        msg = f"{cls.__name__} needs a class method from_raw_string or from_raw_string_with_context"
        raise TypeError(msg)
    _EXTENSIONS[tag] = cls


def mpath_query_extension(tag: str, override: bool = False) -> Callable[[_ExtensionT], _ExtensionT]:
    """`register_mpath_query_extension` as a class decorator."""

    def register(cls: _ExtensionT) -> _ExtensionT:
        register_mpath_query_extension(tag, cls, override)
        return cls

    return register


def build_extension(tag: str, text: str, context: QueryContext) -> Fragment:
    """The fragment for ``[tag:text]``.

    Raises:
        MPathParseError: The tag is unknown, or its class refuses the text.
    """
    cls = _EXTENSIONS.get(tag)
    if cls is None:
        msg = f"unknown extension [{tag}:...]; known are {', '.join(sorted(_EXTENSIONS))}"
        raise MPathParseError(msg)
    if hasattr(cls, "from_raw_string_with_context"):
        fragment = cls.from_raw_string_with_context(text, context)
    else:
        fragment = cls.from_raw_string(text)
    if not isinstance(fragment, Fragment):
        msg = f"extension [{tag}:...] returned {type(fragment).__name__} instead of a mpath.Fragment"
        raise MPathParseError(msg)
    return fragment


@mpath_query_extension("class")
@mpath_query_extension("cls")
@dataclass(frozen=True)
class Class(Fragment):
    """``[cls:torch.nn.Linear]``: a level that is an instance of the class, subclasses included."""

    cls: type | tuple[type, ...]

    @classmethod
    def from_raw_string_with_context(cls, raw: str, context: QueryContext) -> Class:
        """Look the class up among the names of the query's context."""
        try:
            found = context.resolve(raw.strip())
        except NameError as error:
            raise MPathParseError(str(error)) from error
        if not isinstance(found, type):
            msg = f"[cls:{raw}] names {type(found).__name__} {found!r}, not a class"
            raise MPathParseError(msg)
        return cls(found)

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        return isinstance(module, self.cls)

    def __str__(self) -> str:
        classes = self.cls if isinstance(self.cls, tuple) else (self.cls,)
        return "[cls:" + "|".join(cls.__qualname__ for cls in classes) + "]"


@mpath_query_extension("regex")
@mpath_query_extension("re")
@dataclass(frozen=True)
class RegexPath(Fragment):
    r"""``[re:layer\d+]``: a level whose whole name matches the pattern."""

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            msg = f"[re:{self.pattern}] is not a regular expression: {error}"
            raise MPathParseError(msg) from error

    @classmethod
    def from_raw_string(cls, raw: str) -> RegexPath:
        """The text is the pattern, spaces included."""
        return cls(raw)

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        return re.fullmatch(self.pattern, name) is not None

    def __str__(self) -> str:
        return f"[re:{self.pattern}]"


@mpath_query_extension("qtag")
@mpath_query_extension("quantizer")
@dataclass(frozen=True)
class QuantizerTags(Fragment):
    """``[quantizer:parameter/weight, after/linear]``: a quantizer or stub that has all of the tags."""

    tags: tuple[str, ...]

    @classmethod
    def from_raw_string(cls, raw: str) -> QuantizerTags:
        """Split the text at commas."""
        tags = tuple(tag.strip() for tag in raw.split(",") if tag.strip())
        if not tags:
            msg = "[quantizer:] needs at least one tag, for example [quantizer:parameter/weight]"
            raise MPathParseError(msg)
        return cls(tags)

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        metadata = getattr(module, "quant_metadata", None)
        return metadata is not None and all(tag in metadata for tag in self.tags)

    def __str__(self) -> str:
        return f"[quantizer:{', '.join(self.tags)}]"

"""Query text in, selector out: a recursive-descent parser of the grammar in the package's docstring."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from fastforward.selection.mpath.context import QueryContext, user_context
from fastforward.selection.mpath.errors import MPathParseError
from fastforward.selection.mpath.extensions import build_extension
from fastforward.selection.mpath.selectors import (
    AnyDepth,
    Disjoint,
    Path,
    Selector,
    Wildcard,
    is_one_level,
    sequence,
)

_NAME = re.compile(r"\w+")
_SPACE = re.compile(r"\s*")
_EXTENSION = re.compile(r"\[\s*(\w+)\s*:((?:\\.|[^\]\\])*)\]", re.DOTALL)


def query(
    text: str | Selector,
    *,
    context: QueryContext | None = None,
    aliases: Mapping[str, str | Selector] | None = None,
) -> Selector:
    """Parse a query.

    Args:
        text: The query; a selector is returned as it is.
        context: Where class names are looked up; by default the variables of the calling code.
        aliases: What ``&name`` stands for, as queries or selectors.

    Returns:
        The selector, which combines with others through ``/``, ``|``, ``&`` and ``~``.

    Raises:
        MPathParseError: The text does not follow the grammar; the message points at the place.
    """
    if isinstance(text, Selector):
        return text
    if not isinstance(text, str):
        msg = f"a query is a string or a selector, not {type(text).__name__}"
        raise TypeError(msg)
    return _Parser(text, context or user_context(), aliases or {}).parse()


def aliases(**queries: str | Selector) -> dict[str, Selector]:
    """Parse named queries for use as ``&name``; a later one may use the earlier ones.

    >>> from fastforward.selection import mpath
    >>> names = mpath.aliases(first="encoder/layer/0", weights="&first/**/[qtag:parameter/weight]")
    >>> str(mpath.query("&weights", aliases=names))
    'encoder/layer/0/**/[quantizer:parameter/weight]'
    """
    context, known = user_context(), dict[str, Selector]()
    for name, text in queries.items():
        known[name] = query(text, context=context, aliases=known)
    return known


@dataclass
class _Parser:
    text: str
    context: QueryContext
    aliases: Mapping[str, str | Selector]
    open_aliases: frozenset[str] = field(default_factory=frozenset)
    position: int = 0

    def parse(self) -> Selector:
        selector = self.query()
        if self.position < len(self.text):
            self.fail(f"unexpected {self.text[self.position]!r}")
        return selector

    def query(self) -> Selector:
        self.accept("/")
        fragments = [self.fragment()]
        while self.accept("/") and self.peek() not in ("", ",", "}"):
            fragments.append(self.fragment())
        return sequence(*fragments)

    def fragment(self) -> Selector:
        start = self.peek()
        if start == "~":
            return self.inverted()
        if start == "&":
            return self.alias()
        if start == "[":
            return self.extension()
        if start == "{":
            return self.alternatives()
        if start == "*":
            return self.wildcard()
        return Path(self.name("a name, '*', '**', '~', '&', '[' or '{'"))

    def inverted(self) -> Selector:
        start = self.position
        self.accept("~")
        selector = self.fragment()
        if not is_one_level(selector):
            self.position = start
            self.fail("'~' needs a fragment of one level")
        return ~selector

    def alias(self) -> Selector:
        self.accept("&")
        start = self.position
        name = self.name("the name of an alias after '&'")
        if name not in self.aliases or name in self.open_aliases:
            self.position = start
            known = ", ".join(sorted(self.aliases)) or "none"
            self.fail(f"alias {name!r} refers to itself" if name in self.open_aliases else
                      f"unknown alias {name!r}; known: {known}")  # fmt: skip
        value = self.aliases[name]
        if isinstance(value, Selector):
            return value
        return _Parser(value, self.context, self.aliases, self.open_aliases | {name}).parse()

    def extension(self) -> Selector:
        match = _EXTENSION.match(self.text, self.position)
        if match is None:
            self.fail("expected '[tag:text]'; a bracket within the text is written '\\]'")
        try:
            # Only "\]" is the grammar's escape; other backslashes belong to the text (regular expressions).
            fragment = build_extension(match[1], match[2].replace("\\]", "]"), self.context)
        except MPathParseError as error:
            self.fail(error.reason)
        self.position = match.end()
        return fragment

    def alternatives(self) -> Selector:
        self.accept("{")
        options = [self.query()]
        while self.accept(","):
            options.append(self.query())
        if not self.accept("}"):
            self.fail("expected ',' or '}'")
        return Disjoint(tuple(options)) if len(options) > 1 else options[0]

    def wildcard(self) -> Selector:
        stars = re.compile(r"\*+").match(self.text, self.position)
        if stars is None or len(stars[0]) > 2:
            self.fail("expected '*' or '**'")
        self.position = stars.end()
        return Wildcard() if len(stars[0]) == 1 else AnyDepth()

    def name(self, expected: str) -> str:
        self.peek()
        match = _NAME.match(self.text, self.position)
        if match is None:
            self.fail(f"expected {expected}")
        self.position = match.end()
        return match[0]

    def peek(self) -> str:
        space = _SPACE.match(self.text, self.position)
        self.position = space.end() if space else self.position
        return self.text[self.position : self.position + 1]

    def accept(self, character: str) -> bool:
        found = self.peek() == character
        self.position += found
        self.peek()
        return found

    def fail(self, reason: str) -> NoReturn:
        raise MPathParseError(reason, self.text, self.position)

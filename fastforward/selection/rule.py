r"""One rule of a configuration: which sites it selects, and what it gives them.

A rule selects sites in one of three ways:

- a query of `fastforward.mpath`, ``"encoder/**/[quantizer:parameter/weight]"``;
- a fully qualified name, ``"encoder.layer.0.weight_quantizer"``, or that of a module;
- ``"re:"`` and a regular expression that matches a whole qualified name, ``r"re:encoder\.layer\.\d+"``.

It gives them a quantizer class with arguments, a factory, a scheme (each site is then quantized as its role asks), or
None, which keeps them float. Schemes and None apply to everything below a module that the rule selects; a quantizer
or factory to the sites selected themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from fastforward.nn.quantizer import Quantizer
from fastforward.selection.mpath import FilterResult, Selector, query, root, search
from fastforward.selection.mpath.context import QueryContext
from fastforward.selection.quantizers import QuantizerCollection, QuantizerFactory, as_factory
from fastforward.selection.roles import Governing
from fastforward.selection.scheme import Scheme, role_of

EVERYTHING = "**"
"""The query of a configuration's base scheme."""

Target: TypeAlias = "type[Quantizer] | QuantizerFactory | Scheme | None"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        query: What it selects, as it was given.
        target: What the sites get.
        kwargs: Arguments of a quantizer class.
        selector: The query, read; None when it goes by qualified name.
    """

    query: str | Selector
    target: Target
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    selector: Selector | None = field(default=None, compare=False, repr=False)

    def selected(self, model: torch.nn.Module, sites: QuantizerCollection) -> set[tuple[int, str]]:
        """Keys of the sites that the rule selects."""
        if self.selector is not None:
            selector = self.selector / root if self._reaches_below else self.selector
            return {result.key for result in search(selector, model)}
        matches = name_matcher(str(self.query))
        return {site.key for site in sites if any(map(matches, self._candidates(site.full_name)))}

    def choose(self, name: str, site: FilterResult, governing: Governing | None) -> tuple[Quantizer | None, str]:
        """The quantizer for a selected site, or None, and the reason."""
        current = site.module
        assert isinstance(current, Quantizer)  # sites are quantizers
        if self.target is None:
            return None, f"rule {str(self.query)!r}: float"
        if isinstance(self.target, Scheme):
            role = role_of(site, current.quant_metadata, governing)
            quantizer, reason = self.target.choose(current.quant_metadata, role)
            return quantizer, reason if self.query == EVERYTHING else f"rule {str(self.query)!r}: {reason}"
        made = as_factory(self.target, self.kwargs)(name, current)
        if made is not None and not isinstance(made, Quantizer):
            msg = f"rule {str(self.query)!r} made {type(made).__name__} instead of a Quantizer for {name}"
            raise TypeError(msg)
        return made, f"rule {str(self.query)!r}"

    @property
    def _reaches_below(self) -> bool:
        return self.target is None or isinstance(self.target, Scheme)

    def _candidates(self, name: str) -> Iterator[str]:
        yield name
        while self._reaches_below and "." in name:
            name = name.rpartition(".")[0]
            yield name


def make_rule(selected: str | Selector, target: Target, kwargs: Mapping[str, Any], context: QueryContext) -> Rule:
    """A rule whose query has been read.

    Args:
        selected: A query, a qualified name, or ``re:`` and an expression.
        target: What the sites get.
        kwargs: Arguments of a quantizer class.
        context: Where class names in the query are looked up.

    Raises:
        MPathParseError: The query does not follow the grammar.
        ValueError: The expression is wrong.
    """
    if isinstance(selected, str) and is_qualified_name(selected):
        name_matcher(selected)
        return Rule(selected, target, kwargs)
    return Rule(selected, target, kwargs, query(selected, context=context))


def is_qualified_name(text: str) -> bool:
    """Whether a rule's text goes by qualified name: ``re:...``, or a dotted name, which no query can be."""
    return text.startswith("re:") or re.fullmatch(r"[\w-]+(\.[\w-]+)+", text) is not None


def exactness(text: str) -> int:
    """How exact a key of a mapping is: 2 for one name, 1 for a ``re:`` expression, 0 for a query."""
    if re.fullmatch(r"[\w-]+(\.[\w-]+)*", text):
        return 2
    return int(text.startswith("re:"))


def name_matcher(text: str) -> Callable[[str], bool]:
    """Whether a full name is the one a rule names, or matches its ``re:`` expression."""
    if not text.startswith("re:"):
        return text.__eq__
    try:
        pattern = re.compile(text[3:])
    except re.error as error:
        msg = f"rule {text!r} is not a regular expression: {error}"
        raise ValueError(msg) from error
    return lambda name: pattern.fullmatch(name) is not None

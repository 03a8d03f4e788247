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

Target: TypeAlias = "type[Quantizer] | QuantizerFactory | Scheme | None"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        query: What it selects, as it was given.
        target: What the sites get.
        kwargs: Arguments of a quantizer class.
        context: Where class names in the query are looked up.
    """

    query: str | Selector
    target: Target
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    context: QueryContext = field(default_factory=QueryContext, compare=False, repr=False)

    def selected(self, model: torch.nn.Module, sites: QuantizerCollection) -> set[tuple[int, str]]:
        """Keys of the sites that the rule selects."""
        chosen = self._names(model, sites)
        if chosen is None:
            return {result.key for result in search(self._selector(), model)}
        return {site.key for site in sites if site.full_name in chosen}

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

    def _selector(self) -> Selector:
        selector = query(self.query, context=self.context)
        return selector / root if self._reaches_below else selector

    def _names(self, model: torch.nn.Module, sites: QuantizerCollection) -> set[str] | None:
        """Full names of the selected sites when the rule goes by name; None when it is a query."""
        if not isinstance(self.query, str) or not is_qualified_name(self.query):
            return None
        matches = name_matcher(self.query)
        names = (site.full_name for site in sites)
        return {name for name in names if any(map(matches, self._candidates(name)))}

    def _candidates(self, name: str) -> Iterator[str]:
        yield name
        while self._reaches_below and "." in name:
            name = name.rpartition(".")[0]
            yield name


def is_qualified_name(text: str) -> bool:
    """Whether a rule's text goes by qualified name: ``re:...``, or a dotted name, which no query can be."""
    return text.startswith("re:") or re.fullmatch(r"[\w-]+(\.[\w-]+)+", text) is not None


def is_exact_name(text: str) -> bool:
    """Whether a key of a mapping is one name rather than a pattern."""
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*", text) is not None


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


def check_query(rule: Rule) -> None:
    """Raise unless the rule's query can be read."""
    if isinstance(rule.query, str) and is_qualified_name(rule.query):
        name_matcher(rule.query)
    else:
        query(rule.query, context=rule.context)

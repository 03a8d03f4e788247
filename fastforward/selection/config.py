"""Configurations: rules that say which sites get which quantizer or scheme; the last matching rule wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from fastforward.nn.quantizer import Quantizer
from fastforward.selection import rules_yaml, schemes
from fastforward.selection.mpath import FilterResult, Selector, root
from fastforward.selection.mpath.context import user_context
from fastforward.selection.quantizers import (
    OverwritePolicy,
    QuantizerCollection,
    all_quantizers,
    as_factory,
)
from fastforward.selection.roles import Governing
from fastforward.selection.rule import EVERYTHING, Rule, Target, exactness, make_rule
from fastforward.selection.scheme import Choice, Scheme, install


class QuantizationConfig:
    """Rules in order; the last one that selects a site decides about it.

    >>> import fastforward as ff
    >>> config = ff.QuantizationConfig(scheme="w8a8").add_rule("classifier", None)
    >>> print(config.to_yaml())
    version: 1
    scheme: w8a8
    rules:
    - query: classifier
      float: true
    <BLANKLINE>

    Args:
        scheme: What sites get that no rule selects, by name or as a `Scheme`; they stay float without it.
    """

    def __init__(self, scheme: str | Scheme | None = None) -> None:
        self.scheme = None if scheme is None else schemes.get(scheme)
        self.rules: list[Rule] = []

    def add_rule(self, query: str | Selector, factory: Target | str, **kwargs: Any) -> Self:
        """Append a rule, which wins over all rules before it.

        Args:
            query: What it selects: a query of `fastforward.mpath`, the qualified name of a site or module, or ``re:``
                and a regular expression for one.
            factory: A quantizer class, a function ``(full_name, current) -> quantizer``, a scheme or its name, or None
                for float. A scheme or None applies to everything below a module that is selected.
            **kwargs: Arguments of the class.

        Returns:
            This configuration.

        Raises:
            MPathParseError: The query does not follow the grammar.
            TypeError: `factory` is none of these, or arguments were given for something other than a class.
            ValueError: No scheme has that name, or the regular expression is wrong.
        """
        target = schemes.get(factory) if isinstance(factory, str) else factory
        if target is None or isinstance(target, Scheme):
            _refuse_arguments(kwargs)
        else:
            as_factory(target, kwargs)
        self.rules.append(make_rule(query, target, kwargs, user_context()))
        return self

    def precedence_score(self, rule: Rule, result: FilterResult) -> int:
        """Which rule decides about a site: the highest score, the later one of equals. Override to change the order.

        Args:
            rule: A rule that selects the site.
            result: The site.
        """
        del result
        return self.rules.index(rule) if rule in self.rules else -1

    def choices(self, model: torch.nn.Module, governing: Governing | None = None) -> list[Choice]:
        """What the rules decide about each site of the model, which stays as it is.

        Args:
            model: A model with stubs.
            governing: Which stub's value is multiplied by what, from a recorded run; schemes use it.
        """
        sites = all_quantizers(model)
        everything = [] if self.scheme is None else [Rule(EVERYTHING, self.scheme, selector=root)]
        selections = [(rule, rule.selected(model, sites)) for rule in (*everything, *self.rules)]
        return [self._decide(site, selections, governing) for site in sites]

    def _decide(
        self,
        site: FilterResult,
        selections: Iterable[tuple[Rule, set[tuple[int, str]]]],
        governing: Governing | None,
    ) -> Choice:
        module = site.module
        assert isinstance(module, Quantizer)  # sites are quantizers
        rules = [rule for rule, keys in selections if site.key in keys]
        if not rules:
            return Choice(site.full_name, None, "no rule selects it", module.quant_metadata)
        scores = [self.precedence_score(rule, site) for rule in rules]
        best = max(range(len(rules)), key=lambda index: (scores[index], index))
        return Choice(site.full_name, *rules[best].choose(site.full_name, site, governing), module.quant_metadata)

    def initialize(
        self,
        model: torch.nn.Module,
        *,
        safe: bool = True,
        overwrite_policy: OverwritePolicy = "error",
        governing: Governing | None = None,
    ) -> QuantizerCollection:
        """Put the quantizers that the rules decide on into the model; a site shared by several modules stays shared.

        Args:
            model: A model with stubs, changed in place, or not at all if an error is raised.
            safe: Accepted for compatibility: sites are searched anew here.
            overwrite_policy: What to do at a site that has a quantizer already and gets another one: raise, leave
                it, or replace it.
            governing: Which stub's value is multiplied by what, from a recorded run; schemes use it.

        Returns:
            The sites that got a quantizer.

        Raises:
            QuantizationError: A site has a quantizer and the policy is ``"error"``.
            ValueError: Unknown policy.
        """
        del safe
        choices = self.choices(model, governing)
        return install(model, choices, overwrite_policy)

    def apply(self, model: torch.nn.Module, governing: Governing | None = None) -> list[Choice]:
        """Like `Scheme.apply`: quantizers already there stay.

        Returns:
            One choice for every site.
        """
        choices = self.choices(model, governing)
        install(model, choices)
        return choices

    @property
    def name(self) -> str:
        """What messages call this configuration."""
        return "configuration" if self.scheme is None else f"configuration based on {self.scheme.name}"

    @property
    def observer(self) -> str:
        """The scheme's observer for calibration."""
        return "auto" if self.scheme is None else self.scheme.observer

    @property
    def steps(self) -> tuple[str, ...]:
        """The scheme's steps beside rounding."""
        return () if self.scheme is None else self.scheme.steps

    @classmethod
    def from_mapping(cls, rules: Mapping[str, Target | str], *, scheme: str | Scheme | None = None) -> Self:
        """Rules from a mapping of names, ``re:`` expressions or queries to schemes, factories or None.

        The more exact kind of key wins, as in torchao's ``FqnToConfig``: a qualified name over an expression over a
        query; within a kind the later entry.
        """
        config = cls(scheme)
        for key in sorted(rules, key=exactness):
            config.add_rule(key, rules[key])
        return config

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The configuration as YAML; written to `path` too when one is given.

        Raises:
            ValueError: A rule holds a function or value that YAML cannot name.
        """
        text = rules_yaml.dump(self.scheme, [(rule.query, rule.target, rule.kwargs) for rule in self.rules])
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path, *, classes: Mapping[str, type[Quantizer]] | None = None) -> Self:
        """Read a configuration; nothing in the file can run code.

        Args:
            source: A path, or the YAML text itself.
            classes: Quantizer classes of yours that the file may name, beside those of `fastforward.nn`.

        Raises:
            ValueError: The text is no configuration; the message names the rule.
            FileNotFoundError: `source` is a path to nothing.
        """
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else _text_of(source)
        scheme, rules = rules_yaml.load(text, classes or {})
        config = cls(scheme)
        for selected, target, kwargs in rules:
            config.add_rule(selected, target, **kwargs)
        return config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizationConfig) and (self.scheme, self.rules) == (other.scheme, other.rules)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        scheme = "" if self.scheme is None else f"scheme={self.scheme.name!r}"
        lines = "".join(f"\n  {str(rule.query)!r}: {_shown(rule)}" for rule in self.rules)
        return f"{type(self).__name__}({scheme}{lines})"


def _refuse_arguments(kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        msg = f"arguments {sorted(kwargs)} are for a quantizer class; schemes and None take none"
        raise TypeError(msg)


def _text_of(source: str) -> str:
    is_text = "\n" in source or (":" in source and Path(source).suffix not in (".yaml", ".yml"))
    return source if is_text else Path(source).read_text(encoding="utf-8")


def _shown(rule: Rule) -> str:
    if rule.target is None:
        return "float"
    if isinstance(rule.target, Scheme):
        return f"scheme {rule.target.name}"
    arguments = ", ".join(f"{name}={value!r}" for name, value in rule.kwargs.items())
    return f"{getattr(rule.target, '__name__', rule.target)}({arguments})"

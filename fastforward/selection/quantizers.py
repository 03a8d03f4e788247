"""Find the quantizers and stubs of a model, and put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from typing_extensions import Self

from fastforward.exceptions import QuantizationError
from fastforward.nn.quantizer import Quantizer
from fastforward.selection.mpath import MPathCollection, Selector, query, search

OverwritePolicy: TypeAlias = Literal["error", "skip", "overwrite"]
QuantizerFactory: TypeAlias = "Callable[[str, Quantizer], Quantizer | None]"


def find_quantizers(
    root: torch.nn.Module, query: str | Selector, *, aliases: Mapping[str, str | Selector] | None = None
) -> QuantizerCollection:
    """The quantizers and stubs below `root` whose path matches.

    Args:
        root: A model, quantized by `fastforward.quantize_model`.
        query: A query of `fastforward.mpath`, such as ``"**/[quantizer:parameter/weight]"``.
        aliases: What ``&name`` stands for in the query.

    Returns:
        The quantizers in the order of the model; empty when nothing matches.

    Raises:
        MPathParseError: The query does not follow the grammar.
    """
    found = search(query, root, aliases=aliases)
    return QuantizerCollection(root, (result for result in found if isinstance(result.module, Quantizer)))


class QuantizerCollection(MPathCollection):
    """Quantizers and stubs found by `find_quantizers`."""

    def initialize(
        self,
        factory: type[Quantizer] | QuantizerFactory,
        *,
        overwrite_policy: OverwritePolicy = "error",
        safe: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Replace each by a new quantizer, which takes over the metadata.

        Args:
            factory: A quantizer class, or a function ``(full_name, current) -> quantizer`` that may return None to
                leave the current one.
            overwrite_policy: What to do at a site that has a quantizer already: raise before anything is changed,
                leave it, or replace it.
            safe: Refuse when the tree has changed since the search.
            **kwargs: Arguments of the class.

        Returns:
            This collection, which now holds the new quantizers.

        Raises:
            QuantizationError: A site has a quantizer and the policy is ``"error"``, or the tree has changed.
            TypeError: Keyword arguments for a function, or something other than a quantizer was made.
            ValueError: Unknown policy.
        """
        make = as_factory(factory, kwargs)
        check_policy(overwrite_policy)
        taken = [result.full_name for result in self if not _is_stub(result.module)]
        if taken and overwrite_policy == "error":
            raise already_quantized(taken)
        keep = overwrite_policy == "skip"
        self.apply(lambda name, current: None if keep and not _is_stub(current) else _made(make, name, current), safe)
        return self


def as_factory(factory: type[Quantizer] | QuantizerFactory, kwargs: Mapping[str, Any]) -> QuantizerFactory:
    """A function ``(full_name, current) -> quantizer`` for a class and its arguments, or for a function."""
    if isinstance(factory, type):
        if not issubclass(factory, Quantizer):
            msg = f"{factory.__name__} is not a Quantizer class"
            raise TypeError(msg)
        return lambda name, current: factory(**kwargs)
    if kwargs:
        msg = f"arguments {sorted(kwargs)} are for a quantizer class; {factory!r} is a function, use functools.partial"
        raise TypeError(msg)
    if not callable(factory):
        msg = f"expected a quantizer class or a function (full_name, current) -> quantizer, got {factory!r}"
        raise TypeError(msg)
    return factory


def check_policy(policy: str) -> None:
    """Raise ValueError unless the policy is known."""
    if policy not in get_args(OverwritePolicy):
        msg = f"unknown overwrite_policy {policy!r}; one of {', '.join(get_args(OverwritePolicy))}"
        raise ValueError(msg)


def already_quantized(names: list[str]) -> QuantizationError:
    """The error for sites that have a quantizer under policy ``"error"``."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    msg = (
        f"already quantized: {shown}. Pass overwrite_policy='skip' to leave such sites, or 'overwrite' to replace them"
    )
    return QuantizationError(msg)


def replace_quantizer(parent: torch.nn.Module, attribute: str, new: Quantizer) -> None:
    """Put `new` at ``parent.attribute``; it takes over the metadata of what was there."""
    current = getattr(parent, attribute)
    new.quant_metadata = current.quant_metadata
    setattr(parent, attribute, new)


def all_quantizers(root: torch.nn.Module) -> QuantizerCollection:
    """Every quantizer and stub below `root`, or `root`'s own."""
    return find_quantizers(root, query("**"))


def _is_stub(module: torch.nn.Module) -> bool:
    return isinstance(module, Quantizer) and module.is_stub()


def _made(make: QuantizerFactory, name: str, current: torch.nn.Module) -> torch.nn.Module | None:
    assert isinstance(current, Quantizer)  # a collection of quantizers holds nothing else
    new = make(name, current)
    if new is None:
        return None
    if not isinstance(new, Quantizer):
        msg = f"the factory returned {type(new).__name__} instead of a Quantizer for {name}"
        raise TypeError(msg)
    new.quant_metadata = current.quant_metadata
    return new

"""A scheme: a model's stubs and their roles in, quantizers and reasons out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastforward.nn.quantizer import Quantizer, QuantizerMetadata
from fastforward.selection.formats import Format
from fastforward.selection.mpath import FilterResult
from fastforward.selection.quantizers import (
    OverwritePolicy,
    QuantizerCollection,
    all_quantizers,
    already_quantized,
    check_policy,
)
from fastforward.selection.roles import Governing, Role, multiplying_operators, role_from_metadata

REASON = "selection_reason"
"""Attribute of a quantizer or stub that says why it is what it is."""


@dataclass(frozen=True)
class Choice:
    """What stands at one site and why.

    Attributes:
        site: Full name of the stub.
        quantizer: The quantizer that replaces it; None leaves the stub.
        reason: Why, in words.
        metadata: What the site is.
    """

    site: str
    quantizer: Quantizer | None
    reason: str
    metadata: QuantizerMetadata


@dataclass(frozen=True)
class Scheme:
    """Which operands of the multiplying operators are quantized, and how.

    A scheme looks at what a value is (its role), never at the names of attributes.

    Attributes:
        name: What `fastforward.schemes.get` knows it by.
        weight: Format of weights; None leaves them float.
        activation: Format of values that depend on the model's input; None leaves them float.
        description: One sentence.
        operators: Only these operators of the operator table; None for all.
        observer: Observer for calibration, by name; ``"auto"`` tries several at each site.
        steps: What `fastforward.quantize` does beside rounding, in order: ``"fold_batch_norm"``, ``"smooth"``,
            ``"round_weights"``, ``"correct_bias"``; `fastforward.calibration.steps` says what each is.
    """

    name: str
    weight: Format | None = None
    activation: Format | None = None
    description: str = ""
    operators: frozenset[str] | None = None
    observer: str = "auto"
    steps: tuple[str, ...] = ()

    def choose(self, metadata: QuantizerMetadata, role: Role | None) -> tuple[Quantizer | None, str]:
        """The quantizer for one stub, or None, and the reason.

        Args:
            metadata: The stub's; a ``# ff: bits=`` pragma in it wins over the scheme's width, ``# ff: skip`` over all.
            role: What multiplies the value, if anything does.
        """
        if "skip" in metadata:
            return None, "the source line says '# ff: skip'"
        if role is None:
            return None, _why_no_role(metadata)
        if self.operators is not None and role.operator not in self.operators:
            return None, f"scheme {self.name} leaves {role.operator} in float"
        chosen = self.weight if role.kind == "weight" else self.activation
        if chosen is None:
            return None, f"scheme {self.name} leaves {role.kind}s in float"
        chosen = chosen.with_bits(metadata.bits)
        pragma = f", {metadata.bits} bits by a pragma" if metadata.bits is not None else ""
        operand = f"{role.operator}({role.argument})" if role.argument else role.operator
        return chosen.build(role), f"scheme {self.name}: {role.kind} of {operand}, {chosen.describe(role)}{pragma}"

    def choices(self, model: torch.nn.Module, governing: Governing | None = None) -> Iterator[Choice]:
        """What the scheme would put at every stub of the model, which stays as it is.

        Args:
            model: A model with stubs.
            governing: Which stub's value is multiplied by what, from a recorded run, by full name. Without it, each
                stub's own metadata decides.
        """
        for result in all_quantizers(model):
            stub = result.module
            if isinstance(stub, Quantizer) and stub.is_stub():
                role = role_of(result, stub.quant_metadata, governing)
                yield Choice(result.full_name, *self.choose(stub.quant_metadata, role), stub.quant_metadata)

    def apply(self, model: torch.nn.Module, governing: Governing | None = None) -> list[Choice]:
        """Replace the stubs that the scheme quantizes; quantizers already there stay.

        Args:
            model: A model with stubs, changed in place.
            governing: As in `choices`.

        Returns:
            One choice for every stub there was.
        """
        choices = list(self.choices(model, governing))
        install(model, choices)
        return choices

    def with_changes(self, **changes: object) -> Scheme:
        """A copy with other attributes: ``schemes.get("w8a8").with_changes(steps=())``."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def role_of(result: FilterResult, metadata: QuantizerMetadata, governing: Governing | None) -> Role | None:
    """The role of a stub: from the recorded run if there is one, otherwise from its metadata."""
    own = role_from_metadata(metadata)
    role = own if governing is None else governing.get(result.full_name)
    if role is None and own is not None and not multiplying_operators()[own.operator].multiplied:
        role = own  # a table of vectors multiplies nothing, so no run reports it
    if role is None or role.kind != "weight" or role.shape is not None:
        return role
    return dataclasses.replace(role, shape=_parameter_shape(result))


def install(model: torch.nn.Module, choices: list[Choice], policy: OverwritePolicy = "skip") -> QuantizerCollection:
    """Put the chosen quantizers in place, and note the reason at every site.

    Args:
        model: The model that the choices are about, changed in place.
        choices: What to put where.
        policy: What to do at a site that has a quantizer already and gets another one.

    Returns:
        The sites that got a quantizer.

    Raises:
        QuantizationError: A site has a quantizer and the policy is ``"error"``; nothing was changed.
    """
    check_policy(policy)
    sites = {site.full_name: site for site in all_quantizers(model)}
    taken = {c.site for c in choices if c.quantizer is not None and not _is_stub(sites[c.site])}
    if taken and policy == "error":
        raise already_quantized(sorted(taken))
    kept = taken if policy == "skip" else set[str]()
    shared = dict[int, Quantizer]()  # a stub that two modules share gives way to one quantizer
    results = [_put(sites[choice.site], choice, shared) for choice in choices if choice.site not in kept]
    return QuantizerCollection(model, (result for result in results if result is not None))


def _is_stub(site: FilterResult) -> bool:
    return isinstance(site.module, Quantizer) and site.module.is_stub()


def _put(site: FilterResult, choice: Choice, shared: dict[int, Quantizer]) -> FilterResult | None:
    if choice.quantizer is None:
        setattr(site.module, REASON, choice.reason)
        return None
    quantizer = shared.setdefault(id(site.module), choice.quantizer)
    quantizer.quant_metadata = choice.metadata
    setattr(quantizer, REASON, choice.reason)
    setattr(site.parent, site.parent_attribute, quantizer)
    return FilterResult(site.full_name, quantizer, site.parent, site.parent_attribute)


def _parameter_shape(result: FilterResult) -> tuple[int, ...] | None:
    # Only to see whether groups divide the axis. Hand-written layers: `weight_quantizer`; rewritten ones:
    # `quantizer_self_weight`, numbered when the source reads it more than once.
    name = result.parent_attribute.removesuffix("_quantizer").removeprefix("quantizer_self_")
    for candidate in (name, name.rstrip("0123456789").removesuffix("_")):
        parameter = getattr(result.parent, candidate, None)
        if isinstance(parameter, torch.Tensor):
            return tuple(parameter.shape)
    return None


def _why_no_role(metadata: QuantizerMetadata) -> str:
    what = f"{metadata.operator}({metadata.argument})" if metadata.argument else metadata.operator
    if "parameter/bias" in metadata:
        return f"bias of {metadata.operator}: added in the accumulator's precision"
    if "activation/output" in metadata:
        return f"output of {metadata.operator}: no multiplication reads it directly"
    return f"{what or 'the value'} is not multiplied"

"""Operators that the source does not show: found at a call site at run time, with stubs made on the first call."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastforward.autoquant.sites import Site

if TYPE_CHECKING:
    from fastforward.autoquant.optable import Operator
    from fastforward.autoquant.scope import Scope


def apply(quantizer: Any, value: Any) -> Any:
    """Quantize ``value``: a tensor, those of a list or tuple, what ``torch.fx`` traces; anything else passes."""
    if isinstance(value, torch.Tensor):
        return quantizer.of_parameter(value) if type(value) is torch.nn.Parameter else quantizer(value)
    if type(value) in (list, tuple):
        return type(value)(apply(quantizer, item) for item in value)
    return quantizer(value) if isinstance(value, torch.fx.Proxy) else value


def method_name(function: Any) -> str:
    """The name of a function or method; of a method of a value that ``torch.fx`` traces too."""
    return str(function.attr if isinstance(function, torch.fx.Proxy) else function.__name__)


def receiver_of(function: Any) -> Any:
    """The tensor, or the value that stands for one while tracing, whose method ``function`` is; ``None`` otherwise."""
    if isinstance(function, torch.fx.Proxy):
        return function.root
    me = getattr(function, "__self__", None)
    return me if isinstance(me, torch.Tensor) else None


def is_made_anew(function: Any) -> bool:
    """Whether its attribute gives another object each time: a tensor's method, or ``apply`` of an autograd function."""
    return receiver_of(function) is not None or isinstance(getattr(function, "__self__", None), type)


class DynamicOperator:
    """An operator that the source did not show (a registry entry, a function passed as a value), at one call site."""

    __slots__ = ("active", "is_method", "names", "operator", "scope")

    def __init__(self, scope: "Scope", number: int, found: "Operator", is_method: bool) -> None:
        self.scope, self.operator = scope, found
        self.is_method = is_method  # a tensor's, asked for once: compilers cannot say it of every callable
        self.names: dict[str, str] = {}
        self.active: dict[str, Any] = {}
        if scope.owner is None:
            return
        line = scope.unit.call_lines[number]
        for site in dynamic_sites(found, line, scope.unit.call_path(number)):
            self.names[site.argument or ""] = scope.owner._ff_add_stub(scope.stub_name(site), site, scope.unit)
        self.refresh()

    def refresh(self) -> None:
        """Recompute which of the stubs are active quantizers."""
        owner = self.scope.owner
        quantizers = {name: owner.__dict__.get(attribute) for name, attribute in self.names.items()}
        live = owner is not None and owner._stubs_live
        self.active = {name: q for name, q in quantizers.items() if q is not None and (live or not q.is_stub())}

    def calling(self, function: Any) -> Callable[..., Any]:
        """``function`` with its operands and result quantized, to be called like it."""
        return functools.partial(self.call, function)

    def call(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` with its operands and result quantized."""
        if not self.active:
            return function(*args, **kwargs)
        receiver = receiver_of(function) if self.is_method else None
        if receiver is not None:
            receiver, *rest = self._positional((receiver, *args))
            function, args = getattr(receiver, method_name(function)), tuple(rest)
        else:
            args = self._positional(args)
        kwargs = {name: self._quantized(name, value) for name, value in kwargs.items()}
        return self._quantized("", function(*args, **kwargs))

    def _positional(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [parameter.name for parameter in self.operator.parameters]
        return tuple(
            self._quantized(names[index], value) if index < len(names) else value for index, value in enumerate(args)
        )

    def _quantized(self, name: str, value: Any) -> Any:
        quantizer = self.active.get(name)
        return value if quantizer is None else apply(quantizer, value)


def dynamic_sites(found: "Operator", line: int, path: tuple[int, ...]) -> list[Site]:
    """The sites of an operator known only at run time: its quantized operands, then its result."""
    suffix = "".join(f"_{number}" for number in path)
    sites = []
    for parameter in found.parameters:
        if parameter.quantized or parameter.maybe_quantized:
            role = f"parameter/{parameter.name}" if parameter.name in ("weight", "bias") else "activation/input"
            name = f"quantizer_{found.identifier}_{parameter.name}{suffix}"
            sites.append(Site(parameter.name, role, found.identifier, parameter.name, line, 0, name=name))
    if found.output_quantized:
        name = f"quantizer_{found.identifier}{suffix}"
        sites.append(Site(found.identifier, "activation/output", found.identifier, None, line, 0, name=name))
    return sites

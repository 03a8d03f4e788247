"""``quantize_``: apply a configuration object to the modules of a model, by filter or by name."""

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.nn import Module

from fastforward.exceptions import QuantizationError

FilterFn = Callable[[Module, str], bool]
Handler = Callable[..., Module]
_H = TypeVar("_H", bound=Handler)
_handlers: "dict[type[QuantConfig], Handler]" = {}


@dataclasses.dataclass
class QuantConfig:
    """Base of configurations: a dataclass whose fields say how a module is quantized.

    What a configuration does is a function registered with :func:`register_quantize_module_handler`.
    """


AOBaseConfig = QuantConfig
"""torchao's name of :class:`QuantConfig`."""


@dataclasses.dataclass
class FqnToConfig(QuantConfig):
    """Configurations by fully qualified module name.

    A key is a name; ``"re:"`` followed by a regular expression that matches a whole name; or ``"_default"`` for linear
    modules that no other key names. Exact names win over expressions, of which the first that matches counts. The
    value None leaves a module as it is.
    """

    fqn_to_config: Mapping[str, QuantConfig | None] = dataclasses.field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        for key in self.fqn_to_config:
            if key.startswith("re:"):
                re.compile(key.removeprefix("re:"))

    def choose(self, module: Module, fqn: str) -> QuantConfig | None:
        """Return the configuration of the module called ``fqn``, or None."""
        named = self.fqn_to_config
        if fqn in named:
            return named[fqn]
        for key, config in named.items():
            if key.startswith("re:") and re.fullmatch(key.removeprefix("re:"), fqn):
                return config
        return named.get("_default") if is_linear(module, fqn) else None


def is_linear(module: Module, fqn: str) -> bool:
    """Return whether ``module`` is a linear layer: the default filter of :func:`quantize_`."""
    del fqn
    return isinstance(module, torch.nn.Linear)


def register_quantize_module_handler(config_type: type[QuantConfig]) -> Callable[[_H], _H]:
    """Register the decorated ``handler(module, config) -> module`` as what ``config_type`` does to a module.

    Example:
        >>> @dataclasses.dataclass
        ... class DoubleConfig(QuantConfig):
        ...     pass
        >>> @register_quantize_module_handler(DoubleConfig)
        ... def _double(module, config):
        ...     return module.double()
        >>> quantize_(torch.nn.Sequential(torch.nn.Linear(1, 1)), DoubleConfig())[0].weight.dtype
        torch.float64
    """
    if not isinstance(config_type, type):
        msg = f"register_quantize_module_handler takes a configuration class, got {config_type!r}"
        raise TypeError(msg)

    def register(handler: _H) -> _H:
        _handlers[config_type] = handler
        return handler

    return register


def registered_configs() -> tuple[type[QuantConfig], ...]:
    """The configuration classes that a handler is registered for."""
    return tuple(_handlers)


def quantize_(
    model: Module,
    config: QuantConfig,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
) -> Module:
    """Apply ``config`` in place to the modules for which ``filter_fn(module, name)`` holds; linear ones by default.

    Every replacement is computed before the first is put in place, so a handler that raises leaves the model's
    structure as it was. Wrappers such as a compiled module are looked through.

    Args:
        model: the model.
        config: an instance of a registered configuration class, or :class:`FqnToConfig`.
        filter_fn: which modules; names do not include a compiled module's ``_orig_mod``.
        device: where to move each module before it is quantized.

    Returns:
        The model; its replacement if the root itself matched.

    Raises:
        TypeError: ``config`` is no configuration, or no handler is registered for its class.
        ValueError: a filter was given together with :class:`FqnToConfig`.
        QuantizationError: no module matched, so that nothing would be quantized.
    """
    if isinstance(config, FqnToConfig):
        if filter_fn is not None:
            msg = "FqnToConfig names its modules itself: leave filter_fn out"
            raise ValueError(msg)
        return _quantize_by_name(model, config, device)
    handler = handler_for(config)
    return _replace(model, lambda module, fqn: handler(module, config), filter_fn or is_linear, device)


def handler_for(config: QuantConfig) -> Handler:
    """Return the function registered for the class of ``config`` or its nearest base."""
    if not isinstance(config, QuantConfig):
        msg = f"config must be an instance of a QuantConfig, got {config!r}"
        raise TypeError(msg)
    for base in type(config).__mro__:
        if base in _handlers:
            return _handlers[base]
    msg = (
        f"nothing is registered for {type(config).__name__}: decorate a function (module, config) -> module with "
        f"@ff.register_quantize_module_handler({type(config).__name__})"
    )
    raise TypeError(msg)


def _quantize_by_name(model: Module, config: FqnToConfig, device: torch.device | str | None) -> Module:
    for chosen in config.fqn_to_config.values():
        if chosen is not None:
            handler_for(chosen)

    def apply(module: Module, fqn: str) -> Module:
        chosen = config.choose(module, fqn)
        assert chosen is not None
        return handler_for(chosen)(module, chosen)

    return _replace(model, apply, lambda module, fqn: config.choose(module, fqn) is not None, device)


def replace_modules(
    model: Module,
    replacement_fn: Callable[..., Module],
    filter_fn: FilterFn,
    cur_fqn: str = "",
    device: torch.device | str | None = None,
    extra_args: tuple[Any, ...] = (),
) -> Module:
    """Replace each module for which ``filter_fn(module, name)`` holds by ``replacement_fn(module, *extra_args)``.

    In place, from the root down; what is inside a replaced module is not looked at. A module that is used in several
    places is replaced once and stays shared. Wrappers such as a compiled module are looked through.

    Returns:
        The model; its replacement if the root itself matched.
    """
    found = _matches(model, filter_fn, cur_fqn.removesuffix("."))
    return _put(model, found, lambda module, fqn: replacement_fn(module, *extra_args), device)


_replace_with_custom_fn_if_matches_filter = replace_modules


def _replace(
    model: Module,
    replacement_fn: Callable[[Module, str], Module],
    filter_fn: FilterFn,
    device: torch.device | str | None,
) -> Module:
    found = _matches(model, filter_fn, "")
    if not found:
        msg = f"no module of {type(model).__name__} matches the filter, so nothing would be quantized"
        raise QuantizationError(msg)
    return _put(model, found, replacement_fn, device)


def _put(
    model: Module,
    found: list[tuple[Module | None, str, str, Module]],
    replacement_fn: Callable[[Module, str], Module],
    device: torch.device | str | None,
) -> Module:
    made: dict[int, Module] = {}
    for _, _, fqn, module in found:
        if id(module) not in made:
            made[id(module)] = replacement_fn(module if device is None else module.to(device), fqn)
    for parent, name, _, module in found:
        if parent is None:
            model = made[id(module)]
        else:
            setattr(parent, name, made[id(module)])
    return model


def _matches(model: Module, filter_fn: FilterFn, fqn: str) -> list[tuple[Module | None, str, str, Module]]:
    """Return parent, attribute, full name and module of every outermost match; parent None for the root."""
    found: list[tuple[Module | None, str, str, Module]] = []
    visited: set[int] = set()

    def visit(parent: Module | None, name: str, fqn: str, module: Module) -> None:
        if filter_fn(module, fqn):
            found.append((parent, name, fqn, module))
            return
        if id(module) in visited:
            return
        visited.add(id(module))
        for child_name, child in module._modules.items():  # named_children() skips a module's second name
            if child is None:
                continue
            wrapped = child_name == "_orig_mod"
            child_fqn = fqn if wrapped else f"{fqn}.{child_name}" if fqn else child_name
            visit(module, child_name, child_fqn, child)

    visit(None, "", fqn, model)
    return found

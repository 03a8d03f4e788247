"""After conversion most rewritten modules hold no active quantizer: they may run the code they were made from."""

from collections.abc import Callable
from typing import Any

import torch

from fastforward.autoquant.scope import SCOPES
from fastforward.nn.call_paths import ANNOUNCED, PENDING
from fastforward.nn.module import QuantizedModule
from fastforward.nn.rewritten import RewrittenModule
from fastforward.nn.ways import may_take_way, take_way


def bypass_rewriting(model: torch.nn.Module) -> None:
    """Let the modules of ``model`` without active quantizers run their float class's own ``forward``.

    The rewritten one gives the same result, but looks at every site on the way; it returns as soon as a quantizer
    becomes active or a recorder wants to see the sites.
    """
    for module in model.modules():
        if not isinstance(module, RewrittenModule) or not module._float_only or not may_take_way(module):
            continue
        if module.__dict__.get(PENDING):
            continue  # quantizers that were loaded for sites which only the rewritten code will find
        if any(scope.replaces_code() for scope in module.__dict__.get(SCOPES, {}).values()):
            continue
        announced = _announced(module)
        if not all(other._float_only for other in announced):
            continue  # what it calls is to know on which call path
        if module.float_class is not None and not _has_fast_path(module.float_class):
            if announced:
                module.__dict__[ANNOUNCED] = announced
            take_way(module, _unless_announced if announced else _unless_active)


def _has_fast_path(cls: type[torch.nn.Module]) -> bool:
    """Whether ``forward`` may compute whole layers from their weights; rewritten code knows when these are integer."""
    code = getattr(cls.forward, "__code__", None)
    return code is None or "get_fastpath_enabled" in code.co_names


def _announced(module: RewrittenModule) -> tuple[QuantizedModule, ...]:
    """The modules whose quantizers depend on from where in ``module`` they are called."""
    scopes = module.__dict__.get(SCOPES, {}).values()
    below = {id(m): m for scope in scopes for called in scope.announced() for m in called.modules()}
    return tuple(m for m in below.values() if isinstance(m, QuantizedModule))


def _unless_active(cls: Any) -> Callable[..., Any]:
    """The float class's ``forward`` unless a quantizer of the module is active."""
    plain = cls.float_class

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (plain if self._float_only else cls).forward(self, *args, **kwargs)

    return forward


def _unless_announced(cls: Any) -> Callable[..., Any]:
    """The same unless one is active in what the module calls on several call paths."""
    plain = cls.float_class

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for other in self.__dict__[ANNOUNCED]:
            if not other._float_only:
                return cls.forward(self, *args, **kwargs)
        return (plain if self._float_only else cls).forward(self, *args, **kwargs)

    return forward

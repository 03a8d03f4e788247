"""Other ways through a module: its class becomes a subclass of itself with another ``forward``.

A function on the instance would do as well, but ``torch.compile`` then checks before every call what is bound in it and
that nobody has hooked the module. Copies and pickles keep their way.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

Way = Callable[[type[torch.nn.Module]], Callable[..., Any]]
"""Makes the ``forward`` of a class; a function at the top of a module, which pickles can name."""


class _OnWay:
    """What a class is that has been given another ``forward``."""

    _ff_way: ClassVar[Way]
    _ff_before: ClassVar[type[torch.nn.Module]]

    def __init_subclass__(cls) -> None:
        """The user's own is not called: this is no new kind of the user's class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        constructor, arguments, *rest = reduced
        named = tuple(self._ff_before if argument is type(self) else argument for argument in arguments)
        return (_again, (type(self)._ff_way, constructor, named), *rest)


def take_way(module: torch.nn.Module, way: Way) -> None:
    """Let ``module`` run the ``forward`` that ``way`` makes of its class."""
    object.__setattr__(module, "__class__", _on_way(type(module), way))


def may_take_way(module: torch.nn.Module) -> bool:
    """Whether ``module`` runs the ``forward`` of its own class."""
    return way_of(module) is None and "forward" not in module.__dict__


def way_of(module: torch.nn.Module) -> Way | None:
    """The way that ``module`` has taken, if any."""
    return getattr(type(module), "_ff_way", None)


def class_before(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of ``module`` without the way that it has taken."""
    return getattr(type(module), "_ff_before", type(module))


@contextlib.contextmanager
def off_way(module: torch.nn.Module) -> Iterator[None]:
    """Within the context ``module`` runs the ``forward`` that it had before."""
    cls = type(module)
    object.__setattr__(module, "__class__", class_before(module))
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", cls)


def _on_way(cls: type[torch.nn.Module], way: Way) -> type[torch.nn.Module]:
    if (cls, way) not in _made:
        _made[cls, way] = _make(cls, way)
    return _made[cls, way]


def _make(cls: type[torch.nn.Module], way: Way) -> type[torch.nn.Module]:
    def body(target: dict[str, Any]) -> None:
        target.update(__module__=cls.__module__, __qualname__=cls.__qualname__, __doc__=cls.__doc__)
        target.update(_ff_way=staticmethod(way), _ff_before=cls, forward=functools.wraps(cls.forward)(way(cls)))

    return types.new_class(cls.__name__, (_OnWay, cls), {"metaclass": type(cls)}, body)


def _again(way: Way, constructor: Callable[..., torch.nn.Module], arguments: tuple[Any, ...]) -> torch.nn.Module:
    module = constructor(*arguments)
    take_way(module, way)
    return module


_made: dict[tuple[type[torch.nn.Module], Way], type[torch.nn.Module]] = {}

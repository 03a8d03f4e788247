"""QuantizedModule: the base of every quantized class.

In comes a float module class; a subclass ``class QuantizedX(QuantizedModule, X)`` adds quantizers to it.
Quantizers are plain attributes, not entries of ``_modules``: code of the user that iterates over a module's children
(``for layer in self``, ``self.children()``) sees exactly the children it had. Everything that manages a module
(``state_dict``, ``to``, ``train``, ``named_modules``, ``apply``) sees the quantizers too.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from fastforward.autoquant.scope import SEVERAL
from fastforward.exceptions import QuantizationError
from fastforward.nn.call_paths import IDENTITY, call_index, here, new_identity, refresh_here, stubs_for_call
from fastforward.nn.quantizer import Quantizer
from fastforward.nn.stub_roles import describe_by_name

_module_map: dict[type[torch.nn.Module], type["QuantizedModule"]] = {}


def quantized_module_map() -> dict[type[torch.nn.Module], type["QuantizedModule"]]:
    """The registered pairs of float class and quantized class (hand-written and generated ones), as a copy."""
    return dict(_module_map)


class QuantizedModule(torch.nn.Module):
    """Base class that gives a module its quantizers.

    Subclassing it together with a float class registers the pair, so that :func:`fastforward.quantize_model` uses the
    subclass; the class keyword ``include_in_module_map=False`` prevents that.

    Subclasses create their stubs in ``__init_quantization__``, which runs once per instance: at the end of
    ``__init__`` when the class is instantiated, or when an instance of the float class is swapped.
    """

    float_class: ClassVar[type[torch.nn.Module] | None] = None
    call_paths: ClassVar[bool] = False
    """Whether the class finds its quantizers through :meth:`at_call` and so can have others for each call path."""
    _float_only: bool = True
    _stubs_live: bool = False

    def __init_subclass__(cls, include_in_module_map: bool = True, **kwargs: Any) -> None:
        # The user's own `__init_subclass__` is not called: a companion is no new kind of the user's class.
        if "float_class" not in cls.__dict__:
            cls.float_class = _float_base(cls)
        # FSDP2 makes subclasses of its own of whatever it shards; those are no new way to quantize the float class.
        if include_in_module_map and cls.float_class is not None and not cls.__module__.startswith("torch."):
            _module_map[cls.float_class] = cls

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__init_quantization__()

    def __init_quantization__(self) -> None:
        """Create the quantizer stubs of this module; overridden by subclasses, which call ``super()`` first."""

    # ------------------------------------------------------------------ quantizers
    def own_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers and stubs of this module itself, by attribute name."""
        return {name: value for name, value in self.__dict__.items() if isinstance(value, Quantizer)}

    def register_quantizer(self, name: str, quantizer: Quantizer | None) -> None:
        """Set the quantizer called ``name``; ``None`` says that the module has no such site."""
        if quantizer is None:
            object.__setattr__(self, name, None)
        else:
            setattr(self, name, quantizer)

    def named_quantizers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True, skip_stubs: bool = True
    ) -> Iterator[tuple[str, Quantizer]]:
        """Yield ``(name, quantizer)`` of this module and, with ``recurse``, of all modules below it."""
        modules = self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate) if recurse else [(prefix, self)]
        seen: set[int] = set()
        for path, module in modules:
            if not isinstance(module, QuantizedModule):
                continue
            for name, quantizer in module.own_quantizers().items():
                if (skip_stubs and quantizer.is_stub()) or (remove_duplicate and id(quantizer) in seen):
                    continue
                seen.add(id(quantizer))
                yield f"{path}.{name}" if path else name, quantizer

    def quantizers(self, recurse: bool = True, skip_stubs: bool = True) -> Iterator[Quantizer]:
        """Yield the quantizers of this module and, with ``recurse``, of all modules below it."""
        for _, quantizer in self.named_quantizers(recurse=recurse, skip_stubs=skip_stubs):
            yield quantizer

    def at_call(self) -> Any:
        """What holds the quantizers of the call that begins now: the module, or those of another call path.

        The ``forward`` of a hand-written class with ``call_paths = True`` asks once, and reads all quantizers of
        activations from the answer.
        """
        return here(self) if SEVERAL in self.__dict__ else self

    def _ff_call_index(self, label: str, scope: Any) -> int:
        return call_index(self, label, scope)

    def _ff_identity(self) -> str:
        if IDENTITY not in self.__dict__:
            self.__dict__[IDENTITY] = new_identity()
        return self.__dict__[IDENTITY]  # type: ignore[no-any-return]

    def _ff_add_call_path(self, index: int, caller: Any) -> None:
        for name, stub in stubs_for_call(self, index).items():
            setattr(self, name, stub)

    def quantizer_state_dict(self) -> dict[str, torch.Tensor]:
        """The part of ``state_dict()`` that belongs to quantizers."""
        names = tuple(f"{name}." for name, _ in self.named_quantizers())
        return {key: value for key, value in self.state_dict().items() if key.startswith(names)}

    def _quantizers_changed(self) -> None:
        """Recompute what depends on which quantizers are active: the float fast path and the scopes."""
        live = self._stubs_live
        active = live or any(not q.is_stub() or q.overrides for q in self.own_quantizers().values())
        object.__setattr__(self, "_float_only", not active)
        for scope in self.__dict__.get("_ff_scopes", {}).values():
            scope.refresh()
        if SEVERAL in self.__dict__ and not hasattr(self, "_ff_add_stub"):
            refresh_here(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Quantizer):
            describe_by_name(name, value)
            object.__setattr__(self, name, value)
            value._owner_changed = weakref.WeakMethod(self._quantizers_changed)
            self._quantizers_changed()
        else:
            super().__setattr__(name, value)
            if isinstance(self.__dict__.get(name), Quantizer):
                del self.__dict__[name]
                self._quantizers_changed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for quantizer in self.own_quantizers().values():
            quantizer._owner_changed = weakref.WeakMethod(self._quantizers_changed)

    def __delattr__(self, name: str) -> None:
        removed = self.__dict__.get(name)
        super().__delattr__(name)
        if isinstance(removed, Quantizer):
            self._quantizers_changed()

    # ------------------------------------------------------------------ what torch does with submodules
    def named_modules(
        self, memo: set[torch.nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """As in torch; the module's quantizers come after its children."""
        memo = set() if memo is None else memo
        if remove_duplicate and self in memo:
            return
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name, quantizer in self.own_quantizers().items():
            yield from quantizer.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse:
            for quantizer in self.own_quantizers().values():
                quantizer._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def apply(self, fn: Callable[[torch.nn.Module], None]) -> Self:
        """As in torch; quantizers are visited before the module itself."""
        for quantizer in self.own_quantizers().values():
            quantizer.apply(fn)
        return super().apply(fn)

    def train(self, mode: bool = True) -> Self:
        """As in torch; the module's quantizers follow."""
        super().train(mode)
        for quantizer in self.own_quantizers().values():
            quantizer.train(mode)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, quantizer in self.own_quantizers().items():
            if not quantizer.is_stub():
                quantizer.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        mine = self.own_quantizers()
        taken = tuple(f"{prefix}{name}." for name in mine)
        unexpected_keys.extend(key for key in unexpected if not key.startswith(taken))
        for name, quantizer in mine.items():
            if quantizer.is_stub():
                continue
            quantizer._load_from_state_dict(
                state_dict, f"{prefix}{name}.", {}, strict, missing_keys, unexpected_keys, error_msgs
            )

    def __repr__(self) -> str:
        active = {name: q for name, q in self.own_quantizers().items() if not q.is_stub()}
        children = self.__dict__["_modules"]
        # torch builds the text from `_modules`; lend it the active quantizers for this one call.
        self.__dict__["_modules"] = {**children, **active}
        try:
            return super().__repr__()
        finally:
            self.__dict__["_modules"] = children

    def _get_name(self) -> str:
        name = type(self).__name__
        return name if name.startswith("Quantized") else f"Quantized{name}"

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.own_quantizers()})  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> "QuantizedModule":
        msg = (
            f"{type(self).__name__} is quantized and cannot be scripted: torch.jit.script reads the float source and "
            "would drop every quantizer. Use torch.compile or torch.export, or script it after ff.dequantize_model."
        )
        raise QuantizationError(msg)


def _float_base(cls: type) -> type[torch.nn.Module] | None:
    """The float class that ``cls`` quantizes: its first proper module base that is not a QuantizedModule."""
    for base in cls.__mro__[1:]:
        if issubclass(base, torch.nn.Module) and not issubclass(base, QuantizedModule):
            return None if base is torch.nn.Module else base
    return None


@contextlib.contextmanager
def stubs_live(model: torch.nn.Module) -> Iterator[None]:
    """Within the context every stub below ``model`` is really called, so that a recorder sees all sites."""
    modules = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    for module in modules:
        object.__setattr__(module, "_stubs_live", True)
        module._quantizers_changed()
    try:
        yield
    finally:
        for module in modules:
            object.__setattr__(module, "_stubs_live", False)
            module._quantizers_changed()

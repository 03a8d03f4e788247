"""The import hook: ``with quantize_imports("pkg"):`` prepares what the named packages define as they are imported.

The modules themselves run unchanged, from their ordinary bytecode; nothing rewritten is ever cached on disk. After a
module has been executed, each ``nn.Module`` class and function that it defines is handed to
:func:`fastforward.autoquant.bound.bind`, which binds the hook's options to it. That is what the decorator
``@quantizable`` does too, so both give the same companion.
"""

import sys
import threading
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, SourceFileLoader
from typing import Any

from fastforward.autoquant.bound import Options, bind, bound_options
from fastforward.exceptions import QuantizationWarning

# True in a thread whose finder is asking the others: what they import meanwhile is not ours to answer.
_asking = threading.local()


@dataclass
class HookOptions:
    """What one ``quantize_imports`` covers, which options it binds, and the modules it has seen."""

    packages: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    bound: Options = Options()
    prepared: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._below = tuple(f"{name}." for name in self.packages)
        self._below_excluded = tuple(f"{name}." for name in self.exclude)

    def covers(self, name: str) -> bool:
        """Whether the module or ``module.Class`` called ``name`` is in the packages and not excluded."""
        # Asked of every module of the process when the hook is entered and left, hence the prepared prefixes.
        if name not in self.packages and not name.startswith(self._below):
            return False
        return name not in self.exclude and not name.startswith(self._below_excluded)


class QuantizingFinder:
    """Finds modules of the covered packages through the other finders and wraps their loaders."""

    def __init__(self, options: HookOptions) -> None:
        self.options = options

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, its loader wrapped; None where the module is not covered."""
        if getattr(_asking, "busy", False) or not self.options.covers(fullname):
            return None
        _asking.busy = True
        try:
            spec = _ask_others(fullname, path, target)
        finally:
            _asking.busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _wrap(spec.loader, self.options)
        return spec


def _ask_others(fullname: str, path: Sequence[str] | None, target: types.ModuleType | None) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        if isinstance(finder, QuantizingFinder) or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


class QuantizingSourceLoader(SourceFileLoader):
    """The ordinary source loader, followed by the preparation of what the module defines."""

    def __init__(self, fullname: str, path: str, options: HookOptions) -> None:
        super().__init__(fullname, path)
        self.options = options

    def exec_module(self, module: types.ModuleType) -> None:
        """Execute the module as ever, then prepare its classes and functions."""
        super().exec_module(module)
        prepare_module(module, self.options)


class QuantizingLoader:
    """The same for any other loader (zip archives, other import hooks), which keeps doing its own work."""

    def __init__(self, loader: Any, options: HookOptions) -> None:
        self._loader = loader
        self._options = options

    def exec_module(self, module: types.ModuleType) -> None:
        """Let the wrapped loader execute the module, then prepare its classes and functions."""
        self._loader.exec_module(module)
        prepare_module(module, self._options)

    def __getattr__(self, name: str) -> Any:
        # Unpickling and copying ask for attributes before `_loader` is there.
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


def _wrap(loader: Any, options: HookOptions) -> Any:
    if type(loader) is SourceFileLoader:
        return QuantizingSourceLoader(loader.name, loader.path, options)
    # A loader that is a class serves built-in and frozen modules, which have no source.
    return (
        loader if isinstance(loader, type) or not hasattr(loader, "exec_module") else QuantizingLoader(loader, options)
    )


def prepare_module(module: types.ModuleType, options: HookOptions) -> None:
    """Prepare every module class and function that ``module`` itself defines.

    A module that does not lead to torch being imported holds nothing to prepare, and torch stays unimported.
    """
    options.prepared.add(module.__name__)
    if "torch" not in sys.modules:
        return
    for name, value in _definitions(module):
        # A decorator in the source is nearer than the hook: its options stay.
        if options.covers(f"{module.__name__}.{name}") and bound_options(value) is None:
            bind(value, options.bound)


def _definitions(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """The named functions and ``nn.Module`` classes defined in ``module``, nested classes too, each once."""
    import torch

    pending = list(vars(module).values())
    seen: set[int] = set()
    while pending:
        value = pending.pop(0)
        if id(value) in seen or getattr(value, "__module__", None) != module.__name__:
            continue
        seen.add(id(value))
        if isinstance(value, type):
            pending += [member for member in vars(value).values() if isinstance(member, type)]
            if issubclass(value, torch.nn.Module):
                yield value.__qualname__, value
        elif isinstance(value, types.FunctionType) and value.__name__ != "<lambda>":
            yield value.__qualname__, value


class quantize_imports:  # noqa: N801  (used as a function)
    """Context manager: prepare everything that is imported from the named packages inside the ``with`` block.

    The float classes behave as before; :func:`fastforward.quantize_model`, :func:`fastforward.quantize` and the toggle
    later use the options bound here. The finder is removed on exit, also after an exception. Instances can be nested
    (the innermost wins) and entered again.

    Args:
        packages: Names of packages or modules; submodules are covered.
        operator_table: An ``OperatorTable`` for these packages instead of the default one.
        replacement_patterns: ``PatternRule`` objects applied to their source.
        exclude: Names of modules, packages or ``module.Class`` that are left alone.

    Raises:
        TypeError: A name is not a string.
        ValueError: No package is named, or a name is empty or relative.

    Example:
        >>> with quantize_imports("torchvision.models"):  # doctest: +SKIP
        ...     from torchvision.models import resnet18
    """

    def __init__(
        self,
        *packages: str,
        operator_table: Any = None,
        replacement_patterns: Sequence[Any] = (),
        exclude: Iterable[str] | str = (),
    ) -> None:
        excluded = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        _check_names(packages, excluded)
        self._options = HookOptions(packages, excluded, Options(operator_table, tuple(replacement_patterns)))
        self._entered: list[tuple[QuantizingFinder, set[str]]] = []

    def __enter__(self) -> "quantize_imports":
        present = self._imported()
        if present:
            msg = (
                f"already imported, so not prepared by quantize_imports: {', '.join(sorted(present))}; enter it before "
                "these are first imported, or pass the options to quantize_model"
            )
            warnings.warn(msg, QuantizationWarning, stacklevel=2)
        finder = QuantizingFinder(self._options)
        self._entered.append((finder, present))
        sys.meta_path.insert(0, finder)
        return self

    def __exit__(self, *exception: object) -> None:
        finder, present = self._entered.pop()
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        # A hook installed inside the block is asked before ours and may not have asked us.
        for name in sorted(self._imported() - present - self._options.prepared):
            prepare_module(sys.modules[name], self._options)

    def _imported(self) -> set[str]:
        return {name for name, module in list(sys.modules.items()) if module is not None and self._options.covers(name)}


def _check_names(packages: Sequence[str], exclude: Sequence[str]) -> None:
    if not packages:
        msg = "quantize_imports needs the name of at least one package"
        raise ValueError(msg)
    names = (*packages, *exclude)
    if not all(isinstance(name, str) for name in names):
        msg = f"quantize_imports takes the names of packages as strings: {_why_not_strings(names)}"
        raise TypeError(msg)
    for name in names:
        if not name or name.startswith("."):
            msg = f"quantize_imports needs absolute names of packages, not {name!r}"
            raise ValueError(msg)


def _why_not_strings(names: tuple[object, ...]) -> str:
    # Importing typeguard takes longer than importing a large module of models: only a mistake pays for it.
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

    try:
        check_type(names, tuple[str, ...], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        return str(error)
    return repr(names)

"""From a float model to the same model with a stub at every site, in place, and back."""

import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from fastforward.autoquant.bind import bound_engine, engine_for
from fastforward.autoquant.optable import OperatorTable
from fastforward.autoquant.recompile import Engine
from fastforward.autoquant.scope import CALLS, SCOPES, SEVERAL, Scope
from fastforward.exceptions import AutoquantError, QuantizationError
from fastforward.nn import layers  # noqa: F401  (registers the hand-written layers)
from fastforward.nn.call_paths import ANNOUNCED, HERE, IDENTITY, meet_modules
from fastforward.nn.module import QuantizedModule, quantized_module_map
from fastforward.nn.quantizer import Quantizer
from fastforward.nn.rewritten import ADDED, RewrittenModule, companion, has_forward, swap, warn_float
from fastforward.nn.ways import class_before
from fastforward.quantization.tensor import QuantizedTensor

if TYPE_CHECKING:
    from fastforward.autoquant.patterns import PatternRule

SKIP_QUANTIZATION: Final = "skip"
"""In ``extra_conversion``: leave modules of this class as they are."""

Target: TypeAlias = type[QuantizedModule] | None
Skip: TypeAlias = Collection[Any] | Callable[[str, torch.nn.Module], bool] | None
_FLAGS = ("_float_only", "_stubs_live", "_ff_sites", "_ff_forward")
_OWN_STATE = (*_FLAGS, ADDED, SCOPES, CALLS, SEVERAL, IDENTITY, HERE, ANNOUNCED)


def quantize_model(
    model: torch.nn.Module,
    *,
    recursive: bool = True,
    extra_conversion: Mapping[type[torch.nn.Module], Any] | None = None,
    skip: Skip = None,
    operator_table: OperatorTable | None = None,
    replacement_patterns: Sequence["PatternRule"] = (),
) -> torch.nn.Module:
    """Give ``model`` a quantizer stub at every place where a tensor is made or read, in place.

    Each module's class is swapped for its quantized subclass: a hand-written one where there is one, otherwise a
    companion made by rewriting the class's source in memory. With stubs only, the model computes exactly what it did
    before.

    Args:
        model: The model; changed in place.
        recursive: Whether submodules are swapped too.
        extra_conversion: Float class -> quantized class (or ``SKIP_QUANTIZATION``), before everything else.
        skip: Modules that stay as they are: module paths, classes, or a function ``(path, module) -> bool``.
        operator_table: Operator table for classes that have none bound by ``@ff.quantizable`` or the import hook.
        replacement_patterns: Replacement patterns, likewise.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module.
        QuantizationError: It is quantized already, or a ScriptModule. Whatever is raised, the model is left as it was.

    Example:
        >>> import fastforward as ff, torch
        >>> model = ff.quantize_model(torch.nn.Linear(2, 3))
        >>> type(model).__name__
        'QuantizedLinear'
    """
    _check_model(model, recursive)
    engine = engine_for(operator_table, replacement_patterns)
    modules = list(model.named_modules()) if recursive else [("", model)]
    chosen = [
        (module, target)
        for path, module in modules
        if not _skipped(path, module, skip)
        if (target := _target(module, engine, extra_conversion or {})) is not None
    ]
    done: list[torch.nn.Module] = []
    try:
        for module, target in chosen:
            swap(module, target)
            _swap_instance_forward(module)
            done.append(module)
        meet_modules(model)
    except BaseException:
        for module in done:
            _restore(module)
        raise
    return model


def dequantize_model(model: torch.nn.Module) -> torch.nn.Module:
    """The way back: original classes, no quantizers, in place.

    Args:
        model: A model that went through :func:`quantize_model`; parts that did not are left alone.

    Returns:
        ``model`` itself.

    Raises:
        QuantizationError: Parts of the model hold integers (:func:`fastforward.convert`): their float weights are
            gone. The model is unchanged.
    """
    if integer := integer_layers(model):
        shown = ", ".join([path or type(model).__name__ for path in integer[:3]] + ["..."] * (len(integer) > 3))
        msg = (
            f"cannot go back to float: {len(integer)} layers hold integers ({shown}) "
            "and their float weights are gone. Keep a copy.deepcopy of the model from before ff.convert"
        )
        raise QuantizationError(msg)
    for module in list(model.modules()):
        if isinstance(module, QuantizedModule) and module.float_class is not None:
            _restore(module)
    return model


def integer_layers(model: torch.nn.Module) -> list[str]:
    """The paths of the layers of ``model``, and of parameters of its other modules, that are integers, not floats."""
    found = [path for path, module in model.named_modules() if getattr(module, "holds_integers", False)]
    return [*found, *(f"{path}.{name}" if path else name for path, name in _integer_parameters(model))]


def _integer_parameters(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters that conversion has made integers, with the path of the module whose own code multiplies by them."""
    for path, module in model.named_modules():
        for quantizer in module.own_quantizers().values() if isinstance(module, QuantizedModule) else ():
            rows = quantizer.parameter
            if rows is not None and hasattr(quantizer.__dict__.get("simulate"), "gives_integers"):
                owner, _, name = rows.name.rpartition(".")
                if isinstance(module.get_submodule(owner)._parameters.get(name), QuantizedTensor):
                    yield path, rows.name


def quantized(function: Callable[..., Any]) -> "QuantizedFunction":
    """A plain function as a module that owns the function's stubs.

    Args:
        function: A Python function.

    Returns:
        A module that is called like ``function``.

    Raises:
        TypeError: Not a function.
        AutoquantError: No Python source.

    Example:
        >>> import fastforward as ff
        >>> def double(x):
        ...     return x + x
        >>> module = ff.quantized(double)
        >>> module(2)
        4
    """
    if not isinstance(function, types.FunctionType):
        msg = f"quantized: expected a Python function, got {type(function).__name__}"
        raise TypeError(msg) if not callable(function) else AutoquantError(msg)
    return QuantizedFunction(function)


class QuantizedFunction(RewrittenModule):
    """Owns the stubs of a plain function; made by :func:`quantized`."""

    float_class = None

    def __init__(self, function: types.FunctionType) -> None:
        torch.nn.Module.__init__(self)
        self.function = function
        self.__init_quantization__()

    def __init_quantization__(self) -> None:
        """Create the function's stubs."""
        self._bound()

    def _bound(self) -> Callable[..., Any]:
        scopes = self.__dict__.setdefault(SCOPES, {})
        engine = bound_engine(self.function) or engine_for()
        if "" not in scopes:
            scopes[""] = Scope(engine, engine.require_unit(self.function), self, None, "", (), self.function, label="")
            self.__dict__["_ff_forward"] = engine.bind(self.function, scopes[""])
        return self.__dict__["_ff_forward"]  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._bound()(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_ff_forward"}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.nn.Module.__reduce_ex__(self, protocol)

    def extra_repr(self) -> str:
        """The function's name."""
        return self.function.__qualname__


def companion_for(cls: type[torch.nn.Module], engine: Engine | None = None) -> type[RewrittenModule]:
    """The companion class of ``cls``, under the options bound to it.

    Raises:
        AutoquantError: ``cls`` cannot be rewritten.
    """
    made = companion(cls, bound_engine(cls) or engine or engine_for())
    if made is None:
        msg = f"{cls.__module__}.{cls.__qualname__} has no forward method to rewrite"
        raise AutoquantError(msg)
    return made


def _check_model(model: Any, recursive: bool) -> None:
    if not isinstance(model, torch.nn.Module):
        msg = f"quantize_model: expected a torch.nn.Module, got {type(model).__name__}"
        raise TypeError(msg)
    for path, module in model.named_modules() if recursive else [("", model)]:
        where = f"module {path!r}" if path else "the model"
        if isinstance(module, (QuantizedModule, Quantizer)):
            kind = type(module).__name__
            msg = f"{where} ({kind}) is quantized already; ff.dequantize_model(model) takes it back to float"
            raise QuantizationError(msg)
        if isinstance(module, torch.jit.ScriptModule):
            msg = (
                f"{where} is a torch.jit.ScriptModule and has no Python source; quantize the model before scripting it"
            )
            raise QuantizationError(msg)
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
            # Its class changes in the first call, which would undo the swap.
            msg = f"{where} ({type(module).__name__}) is lazy: run the model on example inputs before quantizing it"
            raise QuantizationError(msg)


def _skipped(path: str, module: torch.nn.Module, skip: Skip) -> bool:
    if skip is None:
        return False
    if callable(skip):
        return skip(path, module)
    return any(isinstance(module, item) if isinstance(item, type) else path == item for item in skip)


def _target(module: torch.nn.Module, engine: Engine, extra: Mapping[type[torch.nn.Module], Any]) -> Target:
    cls = class_before(module)
    known = extra.get(cls) or quantized_module_map().get(cls)
    if known is not None:
        return None if known is SKIP_QUANTIZATION else known
    if not has_forward(cls):
        return None
    try:
        return companion(cls, bound_engine(cls) or engine)
    except AutoquantError as error:
        warn_float(module, str(error))
        return None


def _swap_instance_forward(module: torch.nn.Module) -> None:
    """Rewrite a ``forward`` that was assigned to this one instance."""
    forward = module.__dict__.get("forward")
    function = forward.__func__ if isinstance(forward, types.MethodType) else forward
    if not isinstance(module, RewrittenModule) or not isinstance(function, types.FunctionType):
        return
    engine = module._ff_engine
    unit = engine.unit(function) if engine.kind(function) == "helper" else None
    if unit is None:
        return
    scope = Scope(engine, unit, module, None, "instance_forward", (), function)
    module.__dict__.setdefault(SCOPES, {})["instance forward"] = scope
    bound: Any = engine.bind(function, scope)
    module.__dict__["_ff_forward"] = forward
    module.__dict__["forward"] = (
        types.MethodType(bound, forward.__self__) if isinstance(forward, types.MethodType) else bound
    )


def _restore(module: torch.nn.Module) -> None:
    """Make ``module`` an instance of its float class again."""
    assert isinstance(module, QuantizedModule)
    state = module.__dict__
    if "_ff_forward" in state and "forward" in state:
        state["forward"] = state["_ff_forward"]
    attributes, buffers = state.get(ADDED, ((), ()))
    for name in [*module.own_quantizers(), *attributes, *_OWN_STATE]:
        state.pop(name, None)
    for name in buffers:
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    object.__setattr__(module, "__class__", module.float_class)

"""A model in, its quantization state out: a manifest and the tensors it names. The model is only read."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import warnings
from collections.abc import Mapping
from typing import Any

import torch

import fastforward
from fastforward.autoquant.optable import default_table
from fastforward.exceptions import QuantizationWarning, StateError
from fastforward.nn.call_paths import PENDING, pending_quantizers
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization.tensor import QuantizedTensor
from fastforward.selection.quantizers import all_quantizers
from fastforward.selection.rules_yaml import encode
from fastforward.selection.scheme import REASON
from fastforward.state.manifest import Manifest, SavedInteger, SavedModule, SavedParts, SavedQuantizer

SMOOTHING = "smoothing"
"""The buffer of a quantized layer that the float layer does not have."""


class TensorStore:
    """Tensors by key; the same tensor is kept once, under the first name it came with."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._keys: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []  # an id is one only as long as its tensor lives

    def add(self, key: str, tensor: torch.Tensor) -> str:
        """Keep `tensor` and return its key."""
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = key
            self._alive.append(tensor)
            self.tensors[key] = _whole(tensor)
        return self._keys[id(tensor)]


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``torch.compile``'s wrapper and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def capture(model: torch.nn.Module, weights: bool) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """The state of a model.

    Args:
        model: A quantized model, simulated or integer.
        weights: Whether its parameters and buffers belong to the state.

    Raises:
        StateError: There is nothing quantized in it, or a quantizer cannot be described.
    """
    store = TensorStore()
    entries = model.state_dict(keep_vars=True)
    integers = _integers(model, store)
    quantizers = _quantizers(model, store)
    if not integers and not quantizers and not any(isinstance(value, QuantizedTensor) for value in entries.values()):
        msg = "the model has no quantizer and no integer layer; quantize it before saving its quantization"
        raise StateError(msg)
    own = _described(model)
    plain = {name: value for name, value in entries.items() if not name.startswith(own)} if own else entries
    if not weights:
        plain = {name: value for name, value in plain.items() if name.rpartition(".")[2] == SMOOTHING}
    manifest = Manifest(
        model=qualified_name(model),
        weights=weights,
        modules={path: _module(module) for path, module in quantized_modules(model).items()},
        quantizers=tuple(quantizers),
        integers=tuple(integers),
        parameters=_parameters(plain, store),
        written_by={"fastforward": fastforward.__version__, "torch": str(torch.__version__)},
    )
    return manifest, store.tensors


def _described(model: torch.nn.Module) -> tuple[str, ...]:
    """How names of tensors begin that the manifest's quantizers and integer layers describe, under every parent."""
    modules = model.named_modules(remove_duplicate=False)
    return tuple(
        f"{path}." if path else ""
        for path, module in modules
        if isinstance(module, Quantizer) or hasattr(module, "quantization_state")
    )


def quantized_modules(model: torch.nn.Module) -> dict[str, QuantizedModule]:
    """The quantized modules of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedModule)}


def qualified_name(module: torch.nn.Module) -> str:
    """The qualified name of a module's float class, without the Python module: that may be ``__main__`` next time."""
    return float_class(module).__qualname__


def float_class(module: torch.nn.Module) -> type:
    """The class that a quantized module quantizes; its own class for any other module."""
    return getattr(type(module), "float_class", None) or type(module)


def source_hash(module: torch.nn.Module) -> str | None:
    """A hash of what decides which sites a module has; None where there is nothing to read.

    That is the source of its float class, layout and comments aside, and the options it was rewritten with.
    """
    options = _options_hash(getattr(type(module), "_ff_engine", None))
    cls = float_class(module)
    if cls.__module__.partition(".")[0] == "torch":
        return options  # torch's layers keep their sites from release to release, their source not
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return options
    return _hash(canonical(tree)) + (f"+{options}" if options else "")


def canonical(node: Any) -> str:
    """A syntax tree as text that is the same in all versions of Python: ``ast.dump`` shows fields that are empty."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return f"{type(node).__name__}({','.join(f'{name}={canonical(value)}' for name, value in fields)})"
    return f"[{','.join(map(canonical, node))}]" if isinstance(node, list) else repr(node)


def _options_hash(engine: Any) -> str | None:
    if engine is None or engine.options() is None:
        return None
    standard = {(row.spec, row.fallback) for row in default_table()}
    rows = [(row.spec, row.fallback) for row in engine.table if (row.spec, row.fallback) not in standard]
    patterns = [(canonical(rule.pattern), canonical(rule.replacement), rule.on) for rule in engine.patterns]
    return _hash(repr((len(list(engine.table)), rows, patterns, sorted(engine.skip))))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def state_arguments(quantizer: Quantizer) -> dict[str, Any]:
    """The arguments that make another quantizer like this one, as plain data.

    A class says so itself with a method ``state_arguments()``; otherwise each parameter of its ``__init__`` is read
    from the attribute of that name.

    Raises:
        StateError: An argument has no attribute, or is not plain data, a granularity or a data type.
    """
    own = getattr(quantizer, "state_arguments", None)
    arguments = own() if own is not None else _arguments_by_signature(quantizer)
    try:
        return {name: encode(value) for name, value in arguments.items()}
    except ValueError as error:
        msg = f"{type(quantizer).__name__} cannot be saved: {error}; give the class a method state_arguments()"
        raise StateError(msg) from error


# How quantizers of our own call an argument that they keep under another name.
_KEPT_AS = {"dtype": "quantized_dtype"}
_NOT_SAVED = ("metadata", "param_dtype", "device")


def _arguments_by_signature(quantizer: Quantizer) -> dict[str, Any]:
    found = {}
    for name, parameter in list(inspect.signature(type(quantizer).__init__).parameters.items())[1:]:
        if name in _NOT_SAVED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        attribute = name if hasattr(quantizer, name) else _KEPT_AS.get(name, name)
        if not hasattr(quantizer, attribute):
            cls = type(quantizer).__name__
            msg = f"{cls} cannot be saved: it keeps no attribute {name!r}; give it a method state_arguments()"
            raise StateError(msg)
        found[name] = getattr(quantizer, attribute)
    return found


def _module(module: QuantizedModule) -> SavedModule:
    pending = module.__dict__.get(PENDING, {})
    sites = tuple(dict.fromkeys([*module.own_quantizers(), *pending]))
    return SavedModule(qualified_name(module), source_hash(module), sites)


def _quantizers(model: torch.nn.Module, store: TensorStore) -> list[SavedQuantizer]:
    sites = dict[int, list[str]]()
    found = dict[int, Quantizer]()
    for name, quantizer in [*all_quantizers(model).named_modules(), *pending_quantizers(model)]:
        if isinstance(quantizer, Quantizer) and not quantizer.is_stub():
            found.setdefault(id(quantizer), _fixed(quantizer))
            sites.setdefault(id(quantizer), []).append(name)
    return [_quantizer(quantizer, tuple(sites[key]), store) for key, quantizer in found.items()]


def _fixed(quantizer: Quantizer) -> Quantizer:
    """The quantizer itself; one that follows its data, with the range it has now."""
    fixed = getattr(quantizer, "fixed", None)
    plain: Quantizer = quantizer if fixed is None else fixed()
    return plain


def _quantizer(quantizer: Quantizer, sites: tuple[str, ...], store: TensorStore) -> SavedQuantizer:
    if quantizer.overrides:
        msg = f"{sites[0]} is being observed or switched off; leave that 'with' block before saving"
        raise StateError(msg)
    tensors = quantizer.state_dict(keep_vars=True)
    keys = {name: store.add(f"{sites[0]}.{name}", tensor) for name, tensor in tensors.items()}
    learned = tuple(name for name, _ in quantizer.named_parameters())
    reason = getattr(quantizer, REASON, None)
    arguments = state_arguments(quantizer)
    gradient_scale = getattr(quantizer, "gradient_scale", None)
    rows = quantizer.parameter
    integer = hasattr(quantizer.__dict__.get("simulate"), "gives_integers")
    parameter = None if rows is None else (rows.name, rows.start, rows.stop)
    described = type(quantizer).__name__, arguments, keys, learned, gradient_scale, reason, parameter, integer
    return SavedQuantizer(sites, *described)


def _integers(model: torch.nn.Module, store: TensorStore) -> list[SavedInteger]:
    found = []
    for path, module in model.named_modules():
        describe = getattr(module, "quantization_state", None)
        if describe is not None:
            tensors, data = describe()
            keys = {name: store.add(f"{path}.{name}" if path else name, tensor) for name, tensor in tensors.items()}
            found.append(SavedInteger(path, type(module).__name__, data, keys))
    return found


def _parameters(entries: Mapping[str, Any], store: TensorStore) -> dict[str, str | SavedParts]:
    found = dict[str, "str | SavedParts"]()
    for name, value in entries.items():
        if isinstance(value, QuantizedTensor):
            found[name] = _parts(name, value, store)
        elif hasattr(value, "__tensor_flatten__") and not hasattr(value, "full_tensor"):
            msg = f"{name} is a {type(value).__name__}, which a state cannot hold; use quantizers or QuantizedTensor"
            raise StateError(msg)
        elif isinstance(value, torch.Tensor):
            found[name] = store.add(name, value)
        else:
            msg = f"{name} is a {type(value).__name__}, not a tensor: it is not saved"
            warnings.warn(msg, QuantizationWarning, stacklevel=4)
    return found


def _parts(name: str, value: Any, store: TensorStore) -> SavedParts:
    parts, (block_size, dtype, quant_min, quant_max) = value.__tensor_flatten__()
    keys = {part: store.add(f"{name}.{part}", getattr(value, part)) for part in parts}
    return SavedParts(keys, tuple(block_size), str(dtype).removeprefix("torch."), quant_min, quant_max)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    # A parameter of FSDP2 is a DTensor: gather it, so that the file fits any number of processes.
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach()

"""convert_shards(): a model that need not fit into memory becomes integer, a layer at a time.

The model is built on torch's meta device, where tensors have shapes and no memory. Parameters of a layer are read from
safetensors files when its turn comes, and become integers before those of the next layer are read.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastforward.calibration.estimate import estimate_ranges
from fastforward.calibration.min_max import MinMax
from fastforward.exceptions import QuantizationWarning, StateError
from fastforward.integer.conversion import finish
from fastforward.integer.forms import plan
from fastforward.nn.conversion import quantize_model
from fastforward.nn.module import QuantizedModule
from fastforward.selection import schemes
from fastforward.selection.scheme import Scheme

_SHOWN = 5


def convert_shards(
    model: torch.nn.Module,
    source: str | Path,
    *,
    scheme: str | Scheme | None = "w8",
    observer: Any = MinMax,
    backend: str = "auto",
) -> torch.nn.Module:
    """Fill a model on the meta device from safetensors files and convert it, in place and a layer at a time.

    Memory holds the integers of the layers that are done, what stays float, and the float parameters of one layer.

    Args:
        model: Built with ``torch.device("meta")``: a float model, or one whose quantizers are in place.
        source: A ``.safetensors`` file, an index ``*.safetensors.index.json``, or a directory with one of them.
        scheme: What is quantized and how; activations stay float or are quantized on each call, since there is no
            data to run. ``None`` if the model has its quantizers, those of activations calibrated.
        observer: What finds the ranges of weights; an observer class, instance or factory.
        backend: As in ``ff.convert``.

    Returns:
        ``model``.

    Raises:
        StateError: The files are missing or damaged, or lack a parameter or buffer of the model, which is then as it
            was.
        ValueError: The scheme quantizes activations statically.

    Example:
        >>> import fastforward as ff, torch
        >>> with torch.device("meta"):  # doctest: +SKIP
        ...     model = Net()
        >>> model = ff.integer.convert_shards(model, "checkpoint/", scheme="w4_g128")  # doctest: +SKIP
    """
    shards = _Shards(Path(source))
    wanted = _wanted(model)
    missing = [names[0] for names in wanted.values() if not any(name in shards.files for name in names)]
    if missing:
        msg = (
            f"{source} lacks {len(missing)} tensors that the model has on the meta device: {_listed(missing)}. Give "
            "buffers that are computed when the model is built their values, on a real device, before"
        )
        raise StateError(msg)
    unknown = sorted(shards.files.keys() - {name for names in wanted.values() for name in names})
    if unknown:
        msg = f"{source} has {len(unknown)} tensors that the model has not: {_listed(unknown)}"
        warnings.warn(msg, QuantizationWarning, stacklevel=2)
    if scheme is not None:
        _place_quantizers(model, schemes.get(scheme))
    kept: dict[int, torch.nn.Parameter] = {}
    layers: list[torch.nn.Module] = []
    with torch.device("cpu"):  # whatever the caller's context says
        for path, module in list(model.named_modules()):
            _fill(module, f"{path}." if path else "", wanted, shards, kept)
            _find_ranges(module, observer)
            for step in list(plan(module, recursive=False)):
                step.swap(step.layer)
                layers.append(step.layer)
            _keep(module, kept)
        return finish(model, layers, backend)


class _Shards:
    """The tensors of a checkpoint by name."""

    def __init__(self, source: Path) -> None:
        self.files = _files(source)
        self._open: tuple[Path | None, Any] = (None, None)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, in memory that its file is mapped to."""
        path = self.files[name]
        if self._open[0] != path:
            # One file at a time: what it was mapped to is given back when the last of its tensors goes.
            self._open = (None, None)
            self._open = (path, _opened(path))
        tensor: torch.Tensor = self._open[1].get_tensor(name)
        return tensor


def _files(source: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if source.is_dir():
        found = sorted(source.glob("*.safetensors.index.json")) or sorted(source.glob("*.safetensors"))
        if not found:
            msg = f"{source} holds no .safetensors files"
            raise StateError(msg)
        return {name: path for one in found for name, path in _files(one).items()}
    if not source.exists():
        msg = f"{source} does not exist"
        raise StateError(msg)
    if source.suffix == ".json":
        weight_map = json.loads(source.read_text())["weight_map"]
        return {name: source.parent / Path(file).name for name, file in weight_map.items()}
    return dict.fromkeys(_opened(source).keys(), source)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        msg = f"{path} cannot be read as safetensors: {error}"
        raise StateError(msg) from error


def _wanted(model: torch.nn.Module) -> dict[int, list[str]]:
    """The names of each tensor on the meta device, by identity: tied parameters have several."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, tensor in _own(module):
            names.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
    return names


def _own(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of the module itself that have no memory."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.is_meta:
            yield name, tensor


def _place_quantizers(model: torch.nn.Module, scheme: Scheme) -> None:
    if scheme.activation is not None and not scheme.activation.dynamic:
        msg = (
            f"scheme {scheme.name} quantizes activations with ranges that take data to find; use one for weights only "
            "or with dynamic activations, or pass a model with calibrated quantizers and scheme=None"
        )
        raise ValueError(msg)
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        quantize_model(model)
    scheme.apply(model)


def _fill(
    module: torch.nn.Module,
    prefix: str,
    wanted: dict[int, list[str]],
    shards: _Shards,
    kept: dict[int, torch.nn.Parameter],
) -> None:
    """Give the module's own tensors their values."""
    for name, tensor in list(_own(module)):
        if id(tensor) in kept:
            module._parameters[name] = kept[id(tensor)]
            continue
        stored = next(full for full in (prefix + name, *wanted[id(tensor)]) if full in shards.files)
        value = shards.read(stored)
        if value.shape != tensor.shape:
            msg = f"{stored} has shape {tuple(value.shape)} in its file, the model needs {tuple(tensor.shape)}"
            raise StateError(msg)
        value = value.to(tensor.dtype)
        if name in module._parameters:
            parameter = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
            parameter._ff_meta = tensor  # type: ignore[attr-defined]
            module._parameters[name] = parameter
        else:
            module._buffers[name] = value.clone()


def _find_ranges(module: torch.nn.Module, observer: Any) -> None:
    """Calibrate the quantizers of the module's own parameters."""
    if not isinstance(module, QuantizedModule):
        return
    for name, quantizer in module.own_quantizers().items():
        parameter = module._parameters.get(name.replace("_quantizer", "").replace("quantizer_self_", ""))
        if parameter is not None and not quantizer.is_stub() and not quantizer.is_calibrated:
            with estimate_ranges([quantizer], observer):
                quantizer(parameter)


def _keep(module: torch.nn.Module, kept: dict[int, torch.nn.Parameter]) -> None:
    """Take what stays float out of the mapped file, once for all modules that share it."""
    for name, parameter in module._parameters.items():
        meta = None if parameter is None else parameter.__dict__.pop("_ff_meta", None)
        if parameter is not None and meta is not None:
            own = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            module._parameters[name] = kept[id(meta)] = own


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

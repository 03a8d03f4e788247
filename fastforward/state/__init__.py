"""Save the quantization of a model to a file, and load it into the same model elsewhere.

A state is a safetensors file with a JSON manifest in its header: quantizers with their ranges and where they stand,
integer layers, and (unless told otherwise) the parameters and buffers of the model. Loading runs no code from the file
and leaves the model untouched when anything is wrong.

A module that stores integers takes part through two methods::

    def quantization_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        '''Tensors by name, and JSON data: all that it takes to build the module again.'''

    @classmethod
    def from_quantization_state(cls, module, tensors, data) -> torch.nn.Module:
        '''The module built again, to stand in the place of `module`, which is left as it is.'''

Its class is found by name in ``fastforward.integer.__all__``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from fastforward.exceptions import FastForwardError, QuantizationWarning, StateError
from fastforward.nn.quantizer import Quantizer
from fastforward.selection.quantizers import all_quantizers
from fastforward.state import file as state_file
from fastforward.state.capture import capture, quantized_modules, unwrap
from fastforward.state.manifest import Manifest, from_json
from fastforward.state.restore import Change, Restorer, finish_integers

FILE_NAME = "quantization.safetensors"
_SHOWN = 8
_ModuleT = TypeVar("_ModuleT", bound=torch.nn.Module)


def save_quantization(
    model: torch.nn.Module,
    path: str | Path,
    *,
    weights: bool = True,
    max_shard_size: int | None = None,
) -> Path:
    """Save the quantization of a model.

    Args:
        model: A quantized model, simulated or integer; ``torch.compile`` and data-parallel wrappers are looked through.
        path: The file to write, or a directory for a file ``quantization.safetensors``. It is replaced as a whole or,
            if anything fails, left as it was.
        weights: Save parameters and buffers too. Without them the state fits only a model that has the same ones.
        max_shard_size: Largest number of bytes of tensors per file; further files lie beside the first.

    Returns:
        The file.

    Raises:
        StateError: Nothing is quantized, a quantizer cannot be described, or the file cannot be written.

    Example:
        >>> import fastforward as ff
        >>> path = ff.save_quantization(model, "model.safetensors")  # doctest: +SKIP
    """
    file = _file(path)
    if max_shard_size is not None and max_shard_size <= 0:
        msg = f"max_shard_size must be positive, got {max_shard_size}"
        raise ValueError(msg)
    manifest, tensors = capture(unwrap(model), weights)
    state_file.write(file, state_file.Contents(manifest.to_json(), tensors), max_shard_size)
    return file


def load_quantization(
    model: _ModuleT,
    path: str | Path,
    *,
    partial: bool = False,
    classes: Mapping[str, type[Quantizer]] | None = None,
) -> _ModuleT:
    """Load what `save_quantization` saved.

    Args:
        model: The model, float or quantized with stubs; changed in place. A float one goes through
            `fastforward.quantize_model` first, so pass a quantized one if that needs other arguments.
        path: The file, or the directory that was given when saving.
        partial: Load what fits and warn about the rest, instead of raising.
        classes: Quantizer classes of yours that the state may name, beside those of `fastforward.nn`.

    Returns:
        The model, on the devices where its parameters are.

    Raises:
        StateError: The file is missing, damaged, of another version, or does not fit the model, which is then as it
            was. The message says which sites and parameters, and which classes changed their source.

    Example:
        >>> import fastforward as ff
        >>> model = ff.load_quantization(Net(), "model.safetensors")  # doctest: +SKIP
    """
    file = _file(path)
    contents = state_file.read(file)
    manifest = from_json(contents.manifest, set(contents.tensors))
    target = unwrap(model)
    made_stubs = _make_stubs(target, manifest)
    try:
        plan = Restorer(target, manifest, contents.tensors, classes or {}, exclusive=not partial).plan()
        if plan.problems and not partial:
            raise StateError(_misfit(file, manifest, plan.problems))
    except BaseException:
        if made_stubs:
            _back_to_float(target)
        raise
    _make(plan.changes, target, manifest)
    if plan.problems:
        warnings.warn(_misfit(file, manifest, plan.problems), QuantizationWarning, stacklevel=2)
    return model


def broadcast_quantization(model: torch.nn.Module, source: int = 0, group: Any = None) -> None:
    """Give every process of ``torch.distributed`` the quantization, parameters and buffers of one of them.

    Without an initialized process group, or in a group of one, nothing happens.

    Args:
        model: The same model in every process, quantized or with stubs.
        source: The rank whose state the others take over.
        group: The process group; all processes by default.

    Raises:
        StateError: The model of `source` cannot be described, or a process has another model.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size(group) == 1:
        return
    target = unwrap(model)
    is_source = torch.distributed.get_rank() == source
    sent: list[Any] = [_captured(target) if is_source else None]
    torch.distributed.broadcast_object_list(sent, source, group)
    if isinstance(sent[0], StateError):
        raise sent[0]
    if not is_source:
        _take_over(target, *sent[0])


def _captured(model: torch.nn.Module) -> tuple[Manifest, dict[str, torch.Tensor]] | StateError:
    # An error is sent as well, whatever it is: the other processes are waiting.
    try:
        manifest, tensors = capture(model, weights=True)
        return manifest, {key: tensor.cpu() for key, tensor in tensors.items()}
    except StateError as error:
        return error
    except Exception as error:
        failure = StateError(f"the model cannot be sent to the other processes: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def _take_over(model: torch.nn.Module, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
    quantizers = (module for module in all_quantizers(model).modules() if isinstance(module, Quantizer))
    classes = {type(quantizer).__name__: type(quantizer) for quantizer in quantizers}
    plan = Restorer(model, manifest, tensors, classes).plan()
    if plan.problems:
        msg = f"this process has another model: {plan.problems[0]}"
        raise StateError(msg)
    _make(plan.changes, model, manifest)


def _make(changes: Iterable[Change], model: torch.nn.Module, manifest: Manifest) -> None:
    for change in changes:
        change()
    if manifest.is_integer:
        finish_integers(model)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _make_stubs(model: torch.nn.Module, manifest: Manifest) -> bool:
    """Quantize a float model if the state needs stubs; return whether that was so."""
    if not manifest.modules or quantized_modules(model):
        return False
    from fastforward.nn.conversion import quantize_model

    try:
        quantize_model(model)
    except FastForwardError as error:
        msg = f"the model cannot be given the sites of the state: {error}"
        raise StateError(msg) from error
    return True


def _back_to_float(model: torch.nn.Module) -> None:
    from fastforward.nn.conversion import dequantize_model

    dequantize_model(model)


def _misfit(file: Path, manifest: Manifest, problems: list[str]) -> str:
    shown = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{file}, the state of a {manifest.model}, does not fit the model:{shown}{more}"

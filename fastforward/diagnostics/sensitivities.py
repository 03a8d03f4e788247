"""Sensitivity: how much each quantized module costs the model's output on its own."""

import dataclasses
from typing import Any

import torch

from fastforward.calibration.batches import Batches, Data
from fastforward.calibration.flow import eager, in_eval_mode
from fastforward.calibration.trace import tensors_in
from fastforward.diagnostics.metrics import decibels
from fastforward.diagnostics.table import text_table
from fastforward.exceptions import QuantizationError
from fastforward.nn.module import QuantizedModule
from fastforward.nn.switching import disable_quantization


@dataclasses.dataclass(frozen=True)
class SensitivityRow:
    """One module, quantized alone.

    Attributes:
        module: Its path.
        sqnr: Signal-to-noise ratio of the model's output against float, in dB; small means sensitive.
    """

    module: str
    sqnr: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found, most sensitive first; ``str()`` of it is a table."""

    rows: tuple[SensitivityRow, ...]

    def __str__(self) -> str:
        return text_table(("SQNR dB", "module"), [(f"{row.sqnr:7.2f}", row.module or "the model") for row in self.rows])


def sensitivity(model: torch.nn.Module, data: Data) -> Sensitivity:
    """Quantize one module at a time and compare the model's output with float.

    Args:
        model: A quantized, not converted model; it runs in evaluation mode, once in float and once per module.
        data: As in ``ff.quantize``.

    Raises:
        QuantizationError: Nothing in the model is quantized.
    """
    batches = Batches(data)
    owners = {
        path: list(module.own_quantizers().values())
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule) and any(not q.is_stub() for q in module.own_quantizers().values())
    }
    if not owners:
        msg = f"{type(model).__name__} has no active quantizers: call ff.quantize(model, data) first"
        raise QuantizationError(msg)
    with in_eval_mode(model), eager():
        with disable_quantization(model):
            reference = _outputs(model, batches)
        rows = [SensitivityRow(path, _alone(model, batches, owners, path, reference)) for path in owners]
    return Sensitivity(tuple(sorted(rows, key=lambda row: row.sqnr)))


def _alone(
    model: torch.nn.Module, batches: Batches, owners: dict[str, list[Any]], path: str, reference: list[torch.Tensor]
) -> float:
    others = [quantizer for other, quantizers in owners.items() if other != path for quantizer in quantizers]
    others = [quantizer for quantizer in others if not quantizer.is_stub()]
    if not others:
        return _ratio(reference, _outputs(model, batches))
    with disable_quantization(others):
        return _ratio(reference, _outputs(model, batches))


def _outputs(model: torch.nn.Module, batches: Batches) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batches.run(model, "sensitivity", progress=False, each=lambda out: found.extend(_floats(out)))
    return found


def _floats(out: Any) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in tensors_in(out) if tensor.is_floating_point()]


def _ratio(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    pairs = list(zip(reference, other, strict=True))
    signal = sum(float(a.double().square().sum()) for a, _ in pairs)
    return decibels(signal, sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))

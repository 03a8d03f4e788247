"""What weight rounding and bias correction need of a linear layer: its sampled inputs, as they are and quantized."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fastforward.calibration.flow import Flow
from fastforward.calibration.samples import Samples
from fastforward.calibration.smoothing import sampled_rows
from fastforward.nn.linear import QuantizedLinear


@dataclasses.dataclass(frozen=True)
class LinearInputs:
    """A quantized linear layer and a sample of its inputs.

    Attributes:
        path: The layer's module path.
        layer: The layer; its input quantizer is calibrated, or a stub.
        rows: ``[rows, in_features]``, as they arrive.
    """

    path: str
    layer: QuantizedLinear
    rows: Tensor

    def quantized(self) -> Tensor:
        """The rows as the product sees them: smoothed and rounded, float32."""
        rows = self.rows.float()
        if self.layer.smoothing is not None:
            rows = rows * self.layer.smoothing.reciprocal()
        simulated: Tensor = self.layer.input_quantizer(rows)
        return simulated

    def weight(self) -> Tensor:
        """The weight that goes with :meth:`quantized`, not rounded, float32."""
        weight = self.layer.weight.detach().float()
        return weight if self.layer.smoothing is None else weight * self.layer.smoothing

    def exact(self) -> Tensor:
        """What the float layer makes of the rows, without bias, float32 ``[rows, out_features]``."""
        return self.rows.float() @ self.layer.weight.detach().float().t()


def linear_inputs(model: torch.nn.Module, flow: Flow, samples: Samples) -> Iterator[LinearInputs]:
    """The linear layers of ``model`` with an active weight quantizer, each with its sample."""
    rows = sampled_rows(flow, samples)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and path in rows and not module.weight_quantizer.is_stub():
            yield LinearInputs(path, module, torch.cat(rows[path]))

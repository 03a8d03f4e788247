"""Quantized normalization layers."""

from typing import Any

import torch

from fastforward.nn.module import QuantizedModule
from fastforward.nn.operands import add_operand_stubs, quantize_parameter
from fastforward.nn.quantizer import Quantizer


class QuantizedLayerNorm(QuantizedModule, torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer | None
    bias_quantizer: Quantizer | None
    output_quantizer: Quantizer
    call_paths = True

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        add_operand_stubs(self, "layer_norm", ("input", "weight", "bias", "output"))

    def forward(self, input: torch.Tensor) -> Any:
        """Normalize over the last ``len(normalized_shape)`` dimensions."""
        if self._float_only:  # the same as in torch.nn.LayerNorm, a call less
            return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        here = self.at_call()
        weight = quantize_parameter(self.weight_quantizer, self.weight)
        bias = quantize_parameter(self.bias_quantizer, self.bias)
        x = here.input_quantizer(input)
        y = torch.nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return here.output_quantizer(y)


class QuantizedRMSNorm(QuantizedModule, torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` with ``input_``, ``weight_`` and ``output_quantizer``."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer | None
    output_quantizer: Quantizer
    call_paths = True

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        add_operand_stubs(self, "rms_norm", ("input", "weight", "output"))

    def forward(self, x: torch.Tensor) -> Any:
        """Divide by the root mean square over the last ``len(normalized_shape)`` dimensions."""
        if self._float_only:
            return super().forward(x)
        here = self.at_call()
        weight = quantize_parameter(self.weight_quantizer, self.weight)
        y = torch.nn.functional.rms_norm(here.input_quantizer(x), self.normalized_shape, weight, self.eps)
        return here.output_quantizer(y)


class QuantizedGroupNorm(QuantizedModule, torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer | None
    bias_quantizer: Quantizer | None
    output_quantizer: Quantizer
    call_paths = True

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        add_operand_stubs(self, "group_norm", ("input", "weight", "bias", "output"))

    def forward(self, input: torch.Tensor) -> Any:
        """Normalize ``[batch, channels, *]`` over groups of channels."""
        if self._float_only:
            return super().forward(input)
        here = self.at_call()
        weight = quantize_parameter(self.weight_quantizer, self.weight)
        bias = quantize_parameter(self.bias_quantizer, self.bias)
        x = here.input_quantizer(input)
        return here.output_quantizer(torch.nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps))


class _QuantizedBatchNorm(QuantizedModule, include_in_module_map=False):
    """Batch normalization; running statistics are updated from the quantized input, as in the float class."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer | None
    bias_quantizer: Quantizer | None
    output_quantizer: Quantizer
    weight: Any
    bias: Any
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None
    track_running_stats: bool
    momentum: float | None
    eps: float
    _check_input_dim: Any
    call_paths = True

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        add_operand_stubs(self, "batch_norm", ("input", "weight", "bias", "output"))

    def forward(self, input: torch.Tensor) -> Any:
        """Normalize each channel of ``[batch, channels, *]``."""
        if self._float_only:
            return super().forward(input)
        here = self.at_call()
        self._check_input_dim(input)
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        momentum = self._advance_momentum()
        keeps = not self.training or self.track_running_stats
        y = torch.nn.functional.batch_norm(
            here.input_quantizer(input),
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            quantize_parameter(self.weight_quantizer, self.weight),
            quantize_parameter(self.bias_quantizer, self.bias),
            batch_statistics,
            momentum,
            self.eps,
        )
        return here.output_quantizer(y)

    def _advance_momentum(self) -> float:
        """Count this batch while training and return the weight it gets in the running statistics."""
        count = self.num_batches_tracked if self.training and self.track_running_stats else None
        if count is not None:
            count.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 0.0 if count is None else 1.0 / float(count)


class QuantizedBatchNorm1d(_QuantizedBatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""


class QuantizedBatchNorm2d(_QuantizedBatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""


class QuantizedBatchNorm3d(_QuantizedBatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with ``input_``, ``weight_``, ``bias_`` and ``output_quantizer``."""

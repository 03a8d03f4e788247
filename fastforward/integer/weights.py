"""The integer form of a quantized weight."""

import contextlib
from collections.abc import Iterator

import torch

from fastforward.exceptions import CalibrationError, UnsupportedOperatorError
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization import affine

_SUMMED_AT_ONCE = 1 << 20


def require_integer(quantizer: Quantizer, shape: torch.Size, channel_dim: int = 0) -> None:
    """Raise unless a weight of ``shape`` has a symmetric int8 form with one scale per channel or tensor.

    Raises:
        CalibrationError: The quantizer has no range yet.
        UnsupportedOperatorError: The weight has no such form; the message says why.
    """
    if not isinstance(quantizer, LinearQuantizer):
        msg = f"its weight quantizer is a {type(quantizer).__name__}, not a LinearQuantizer"
        raise UnsupportedOperatorError(msg)
    if not quantizer.is_calibrated:
        msg = f"weight quantizer {quantizer.quant_metadata.describe()} has no range"
        raise CalibrationError(msg)
    if quantizer.quant_min < -128 or quantizer.quant_max > 127:
        msg = f"its weight has {quantizer.num_bits} bits, integer kernels take signed 8 at most"
        raise UnsupportedOperatorError(msg)
    if bool((quantizer.rounded_zero_point() != 0).any()):
        msg = "its weight is quantized asymmetrically (zero point other than 0)"
        raise UnsupportedOperatorError(msg)
    _channel_scales(quantizer, shape, channel_dim)


def integer_weight(
    quantizer: Quantizer, weight: torch.Tensor, channel_dim: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(int8 of weight's shape, float32 scales of shape [channels])``.

    Args:
        quantizer: The calibrated weight quantizer.
        weight: The float weight, smoothing applied.
        channel_dim: The axis along which there may be one scale per channel.

    Raises:
        CalibrationError, UnsupportedOperatorError: As in :func:`require_integer`.
    """
    require_integer(quantizer, weight.shape, channel_dim)
    assert isinstance(quantizer, LinearQuantizer)
    scale = _channel_scales(quantizer, weight.shape, channel_dim)
    integers = affine.quantize(
        weight.detach(),
        quantizer.scale.detach(),
        quantizer.rounded_zero_point(),
        quantizer.quant_min,
        quantizer.quant_max,
        torch.int8,
        quantizer.granularity,
    )
    return integers, scale


def channel_sums(weight: torch.Tensor) -> torch.Tensor:
    """The sum over each channel of int8 ``[channels, ...]``: float64 ``[channels]``, exact.

    Some channels at a time, because torch converts whatever it sums to the type of the result first.
    """
    rows = weight.flatten(1)
    block = max(1, _SUMMED_AT_ONCE // max(rows.shape[1], 1))
    return torch.cat([part.sum(1, dtype=torch.float64) for part in rows.split(block)])


def tensors_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The bias and the buffers of an integer layer by name, as its state holds them."""
    named = {"bias": layer.bias, **layer._buffers}
    return {name: tensor.detach() for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}


@contextlib.contextmanager
def keeping_scales(layer: torch.nn.Module) -> Iterator[None]:
    """Let a conversion of ``layer`` move its buffers called ``..._scale``, but not change their data types."""
    before = {name: scale for name, scale in layer._buffers.items() if name.endswith("_scale") and scale is not None}
    yield
    for name, scale in before.items():
        moved = layer._buffers[name]
        if moved is not None and moved.dtype != scale.dtype:
            layer._buffers[name] = scale.to(moved.device)


def per_group(parameter: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Parameters per tensor, channel or longer group, repeated to ``[rows, groups]``."""
    if parameter.numel() == 1:
        return parameter.reshape(1, 1).expand(rows, groups)
    per_row = parameter.reshape(rows, -1)
    return per_row.repeat_interleave(groups // per_row.shape[1], dim=1)


def _channel_scales(quantizer: LinearQuantizer, shape: torch.Size, channel_dim: int) -> torch.Tensor:
    """One float32 scale per channel; a scale per tensor is repeated."""
    scale = quantizer.scale.detach().float()
    channels = shape[channel_dim]
    if scale.numel() == 1:
        return scale.reshape(1).expand(channels).contiguous()
    per_channel = tuple(1 if dim == channel_dim else size for dim, size in enumerate(shape))
    if tuple(quantizer.granularity.block_size(shape)) != per_channel:
        msg = f"its weight of shape {tuple(shape)} has scales by {quantizer.granularity}, not one per output channel"
        raise UnsupportedOperatorError(msg)
    return scale.reshape(channels).contiguous()

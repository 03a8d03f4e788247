"""Quantization-aware training: learned ranges, frozen norms, schedules, and processes that train together.

A quantized model trains like any other: quantizers pass gradients straight through. What is here concerns the ranges.
They either stand as calibrated, follow the data (`fastforward.calibration.track_ranges`, until ``.freeze()``), or are
learned (`learn_ranges`, until `freeze_ranges`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed

from fastforward.calibration.estimate import track_ranges
from fastforward.exceptions import CalibrationError
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.switching import DisableQuantizationOverride, quantizers_of

__all__ = [
    "GradualQuantization",
    "freeze_batch_norm",
    "freeze_ranges",
    "learn_ranges",
    "parameter_groups",
    "range_parameters",
    "synchronize_ranges",
    "track_ranges",
    "unfreeze_batch_norm",
]

_NORMS = (torch.nn.modules.batchnorm._BatchNorm,)


def learn_ranges(target: Any, *, zero_point: bool | None = None) -> list[torch.nn.Parameter]:
    """Turn the calibrated ranges of a model into parameters.

    Scales get the gradients of Esser et al., "Learned Step Size Quantization" (LSQ, 2020), zero points those of
    Bhalgat et al., "LSQ+" (2020). Make the optimizer afterwards: it has to know the new parameters.

    Args:
        target: A model, a quantizer, or several of either.
        zero_point: Learn zero points too; by default those of asymmetric quantizers.

    Returns:
        The new parameters, for a parameter group of their own.

    Raises:
        CalibrationError: A quantizer has no range to start from, or nothing here has a range that can be learned.
            Nothing was changed then.
    """
    found = [quantizer for quantizer in quantizers_of(target) if isinstance(quantizer, LinearQuantizer)]
    missing = [quantizer.quant_metadata.describe() for quantizer in found if not quantizer.is_calibrated]
    if missing or not found:
        what = f"{len(missing)} quantizers have no range yet ({missing[0]})" if missing else "no quantizer has a range"
        msg = f"cannot learn ranges: {what}; run data inside 'with ff.estimate_ranges(model, ff.observers.MinMax):'"
        raise CalibrationError(msg)
    for quantizer in found:
        quantizer.learn_range(zero_point=zero_point)
    return range_parameters(found)


def freeze_ranges(target: Any) -> None:
    """Turn learned ranges back into buffers, zero points rounded: what integer execution needs."""
    for quantizer in quantizers_of(target):
        if isinstance(quantizer, LinearQuantizer) and list(quantizer.parameters()):
            quantizer.freeze_range()


def range_parameters(target: Any) -> list[torch.nn.Parameter]:
    """The learned scales and zero points below a model or in several quantizers, each once."""
    found = {id(parameter): parameter for q in quantizers_of(target) for parameter in q.parameters()}
    return list(found.values())


def parameter_groups(model: torch.nn.Module, *, range_lr: float, **weights: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the model's own parameters, and the learned ranges without weight decay.

    Args:
        model: A model with learned ranges.
        range_lr: Learning rate of the ranges; they are few and small, so it is worth a choice of its own.
        **weights: Options of the group of weights, such as ``lr``.
    """
    ranges = range_parameters(model)
    known = set(map(id, ranges))
    own = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [{"params": own, **weights}, {"params": ranges, "lr": range_lr, "weight_decay": 0.0}]


def freeze_batch_norm(model: torch.nn.Module) -> int:
    """Keep every batch norm on its running statistics, whatever ``model.train()`` says afterwards.

    Late in quantization-aware training the statistics of single batches only add noise to the ranges after them
    (Krishnamoorthi, "Quantizing deep convolutional networks", 2018, section 3.2.2).

    Returns:
        How many there are.
    """
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    for norm in norms:
        norm.eval()
        # A partial, unlike a bound method, is copied and pickled with its module.
        norm.__dict__["train"] = functools.partial(_stay_in_eval, norm)
    return len(norms)


def unfreeze_batch_norm(model: torch.nn.Module) -> None:
    """Let batch norms follow ``model.train()`` again."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.__dict__.pop("train", None)
            module.train(model.training)


def _stay_in_eval(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    del mode
    return module


class GradualQuantization:
    """Switches groups of quantizers on one after the other while a model trains.

    Every group is off at first; each `step` counts one, and a group goes on when the count reaches its start. Leaving
    the ``with`` block (or `close`) leaves all of them on.

    Args:
        groups: What goes on together: models, quantizers, collections that `fastforward.find_quantizers` returned.
        starts: For each group, the number of steps before it goes on; 0 for at once.

    Raises:
        ValueError: There are not as many starts as groups, or one is negative.

    Example:
        >>> import fastforward as ff
        >>> weights = ff.find_quantizers(model, "**/[quantizer:parameter]")  # doctest: +SKIP
        >>> inputs = ff.find_quantizers(model, "**/[quantizer:activation]")  # doctest: +SKIP
        >>> with GradualQuantization([weights, inputs], starts=[0, 100]) as schedule:  # doctest: +SKIP
        ...     for batch in batches:
        ...         train_on(batch)
        ...         schedule.step()
    """

    def __init__(self, groups: Sequence[Any], starts: Sequence[int]) -> None:
        if len(groups) != len(starts) or any(start < 0 for start in starts):
            msg = f"{len(groups)} groups need as many starts, none negative; got {list(starts)}"
            raise ValueError(msg)
        self.count = 0
        self._switches = [(start, DisableQuantizationOverride()) for start in starts]
        for group, (_, switch) in zip(groups, self._switches, strict=True):
            switch.attach_to(group)
        self._apply()

    @property
    def enabled(self) -> list[bool]:
        """For each group, whether it is on."""
        return [switch.quantization_enabled for _, switch in self._switches]

    def step(self) -> None:
        """Count one step of training."""
        self.count += 1
        self._apply()

    def close(self) -> None:
        """Switch everything on and let go of the quantizers."""
        for _, switch in self._switches:
            switch.detach()

    def _apply(self) -> None:
        for start, switch in self._switches:
            switch.enable_quantization(self.count >= start)

    def __enter__(self) -> GradualQuantization:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def synchronize_ranges(target: Any, optimizer: torch.optim.Optimizer, group: Any = None) -> Any:
    """Average the gradients of learned ranges over all processes before each step of the optimizer.

    `DistributedDataParallel` does that by itself. FSDP2's `fully_shard` averages what belongs to child modules, and
    quantizers are none, so with it this is needed.

    Args:
        target: The model.
        optimizer: Its optimizer; the averaging goes into a hook of it.
        group: The process group; all processes by default.

    Returns:
        A handle whose ``remove()`` ends the averaging.
    """
    parameters = range_parameters(target)

    def average(*_: object) -> None:
        average_gradients(parameters, group)

    return optimizer.register_step_pre_hook(average)


def average_gradients(parameters: Iterable[torch.nn.Parameter], group: Any = None) -> None:
    """Replace each gradient by its mean over all processes, in one collective; a missing one counts as zero."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat, group=group)
    flat /= torch.distributed.get_world_size(group)
    sizes = [gradient.numel() for gradient in gradients]
    for parameter, mean in zip(parameters, flat.split(sizes), strict=True):
        parameter.grad = mean.reshape(parameter.shape).clone()

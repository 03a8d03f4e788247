"""The operators of compiled integer programs: roundings, linear layers that store codes, sums and attention of codes.

Codes are uint8. What a layer knows beforehand is in its operands: the zero point of its input in ``bias``, both scales
in ``factor``. A compiler that fuses elementwise operators does better with those that rounding consists of; it finds
the rounding here as one node, may hand it to the operator that makes its input, and takes the others apart.

A grid is ``step`` (float32, one number), ``inverse`` (one over it), ``zero_point`` (int32, the code of real zero) and
``highest``, its largest code. ``known`` repeats step and zero point as numbers where they never change, for operators
that take nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastforward_kernels import cpu_attention, cpu_chain
from fastforward_kernels import reference_matmul as reference
from fastforward_kernels.library import define

PRODUCT = "Tensor codes, Tensor weight, Tensor factor, Tensor bias, str activation"
GRID = "Tensor step, Tensor inverse, Tensor zero_point, int highest"


def _shape(dtype: torch.dtype) -> Callable[..., Tensor]:
    def shape(codes: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)

    return shape


ROUND_TO_CODES: Callable[..., Tensor] = define(
    f"round_to_codes(Tensor x, {GRID}, float[] known) -> Tensor",
    reference=reference.round_to_codes,
    fake=lambda x, *_: torch.empty_like(x, dtype=reference.CODES),
)
ROUND_TO_GRID: Callable[..., Tensor] = define(
    f"round_to_grid(Tensor x, {GRID}) -> Tensor",
    reference=reference.round_to_grid,
    fake=lambda x, *_: torch.empty_like(x),
)
LINEAR_TO_FLOATS: Callable[..., Tensor] = define(
    f"linear_to_floats({PRODUCT}) -> Tensor",
    reference=reference.linear_to_floats,
    cpu=cpu_chain.linear_to_floats,
    fake=_shape(torch.float32),
)
LINEAR_TO_CODES: Callable[..., Tensor] = define(
    f"linear_to_codes({PRODUCT}, Tensor? smoothing, {GRID}) -> Tensor",
    reference=reference.linear_to_codes,
    cpu=cpu_chain.linear_to_codes,
    fake=_shape(reference.CODES),
)
WEIGHT_OF_INTEGERS: Callable[..., Tensor] = define(
    "weight_of_integers(Tensor integers, Tensor scale) -> Tensor",
    reference=reference.weight_of_integers,
    fake=lambda integers, scale: torch.empty_like(integers, dtype=scale.dtype),
)
"""The floats of a weight: what a module's own code multiplies by says to the compiler which integers they stand for."""
INTEGERS_OF: Callable[..., tuple[Tensor, Tensor]] = define(
    "integers_of(Tensor weight) -> (Tensor, Tensor)",
    reference=reference.integers_of,
    fake=lambda weight: (torch.empty_like(weight, dtype=torch.int8), weight.new_empty(1, 1)),
)
"""What a tensor of integers is made of: a compiler cannot read the attributes of one that the program computes."""
CHANNEL_SUMS: Callable[..., Tensor] = define(
    "channel_sums(Tensor weight, int axis=1) -> Tensor",
    reference=reference.channel_sums,
    cpu=cpu_chain.channel_sums,
    fake=lambda weight, axis=1: weight.new_empty(weight.shape[1 - axis], dtype=torch.int32),
)
CHANNELS_INSIDE: Callable[..., Tensor] = define(
    "channels_inside(Tensor codes, int[] padding, int value) -> Tensor",
    reference=reference.channels_inside,
    cpu=cpu_chain.channels_inside,
    fake=reference.channels_inside,
)
ADDS_CODES: Callable[..., Tensor] = define(
    "adds_codes(Tensor y, Tensor weight) -> Tensor",
    reference=lambda y, weight: y.clone(),
    fake=lambda y, weight: torch.empty_like(y),
)
"""The result ``y`` of a convolution by ``weight``, to which codes may be added: what a layer says to the compiler."""
CONVOLUTION_PLUS_CODES: Callable[..., Tensor] = define(
    "convolution_plus_codes(Tensor codes, Tensor weight, float input_step, Tensor scale, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, str activation, Tensor addend, float addend_step, "
    "int addend_zero_point, float step, int zero_point, int highest) -> Tensor",
    reference=reference.convolution_plus_codes,
    cpu=cpu_chain.convolution_plus_codes,
    fake=lambda codes, *others: torch.empty_like(others[9], memory_format=torch.channels_last),
)
ATTENTION_OF_INTEGERS: Callable[..., Tensor] = define(
    "attention_of_integers(Tensor q, Tensor k, Tensor v, Tensor q_step, Tensor k_step, "
    "Tensor? attn_mask, bool is_causal, float scale) -> Tensor",
    reference=reference.attention_of_integers,
    cpu=cpu_attention.attention_of_integers,
    fake=lambda q, k, v, *_: reference.heads_inside(v.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))),
)

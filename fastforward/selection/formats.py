"""How one operand is quantized: a small declarative record in, a quantizer for one role out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

import fastforward.nn
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from fastforward.selection.roles import Role

Sharing: TypeAlias = Literal["tensor", "channel", "token", "group"]

# Operators whose first operand is a batch of vectors, multiplied along the last axis; a scale per vector factors out.
_VECTORWISE = {
    "linear": "input",
    "matmul": "input",
    "mm": "input",
    "bmm": "input",
    "addmm": "mat1",
    "baddbmm": "batch1",
}


@dataclass(frozen=True)
class Format:
    """A number format and which elements share a scale.

    Attributes:
        bits: Width of the integers; ignored when `dtype` is set.
        symmetric: Zero is the middle of the grid.
        per: Which elements share a scale: the whole tensor, an output channel, a vector along the last axis, or
            `group_size` consecutive elements of the last axis.
        group_size: For ``per="group"``.
        dynamic: Scales are computed from each tensor rather than calibrated.
        dtype: Name of a floating data type of torch, such as ``"float8_e4m3fn"``, instead of integers.
        block_format: Name of a block format of `fastforward.nn` that brings its own scales: ``"mxfp8"``, ``"nf4"``, ...
    """

    bits: int = 8
    symmetric: bool = True
    per: Sharing = "tensor"
    group_size: int | None = None
    dynamic: bool = False
    dtype: str | None = None
    block_format: str | None = None

    def with_bits(self, bits: int | None) -> Format:
        """This format with integers of another width; a floating format becomes an integer one."""
        if bits is None:
            return self
        return dataclasses.replace(self, bits=bits, dtype=None, block_format=None)

    def build(self, role: Role) -> Quantizer:
        """The quantizer for a value in this role; its ranges are still to be calibrated."""
        if self.block_format is not None:
            return _new("BlockFormatQuantizer", self.block_format)
        granularity = self.granularity(role)
        if self.dtype is not None:
            kind = "DynamicFloat8Quantizer" if self.dynamic else "Float8Quantizer"
            return _new(kind, getattr(torch, self.dtype), granularity=granularity)
        if self.dynamic:
            return _new("DynamicLinearQuantizer", self.bits, symmetric=self.symmetric, granularity=granularity)
        # One-sided ranges would move the zero point of weights, which integer kernels want at zero.
        one_sided = {"symmetric": self.symmetric, "allow_one_sided": False}
        return _new("LinearQuantizer", self.bits, granularity=granularity, **one_sided)

    def granularity(self, role: Role) -> Granularity:
        """Which elements share a scale in this role; the next coarser choice where the format's own does not fit."""
        sharing = self.sharing(role)
        if sharing == "group" and self.group_size is not None:
            return PerGroup(self.group_size)
        if sharing == "channel" and role.channel_axis is not None:
            return PerChannel(role.channel_axis)
        return PerToken() if sharing == "token" else PerTensor()

    def sharing(self, role: Role) -> Sharing:
        """What `granularity` decides, as a word."""
        if self.per == "group" and _fits_groups(role, self.group_size):
            return "group"
        if self.per in ("group", "channel") and role.channel_axis is not None:
            return "channel"
        vectors = _VECTORWISE.get(role.operator)
        if self.per == "token" and vectors is not None and role.argument in (vectors, None):
            return "token"
        return "tensor"

    def describe(self, role: Role | None = None) -> str:
        """The format in words, for a role when one is given: ``int8 per channel, symmetric``."""
        if self.block_format is not None:
            return self.block_format
        sharing = self.per if role is None else self.sharing(role)
        groups = f" of {self.group_size}" if sharing == "group" else ""
        words = [f"{self.dtype or f'int{self.bits}'} per {sharing}{groups}"]
        words += [] if self.dtype is not None else ["symmetric" if self.symmetric else "asymmetric"]
        return ", ".join([*words, "dynamic"] if self.dynamic else words)


def _new(name: str, *args: object, **kwargs: object) -> Quantizer:
    quantizer: Quantizer = getattr(fastforward.nn, name)(*args, **kwargs)
    return quantizer


def _fits_groups(role: Role, group_size: int | None) -> bool:
    # Groups run along the last axis; they make sense where that axis is summed over, as in linear and embedding tables.
    if group_size is None or role.channel_axis != 0 or role.operator.startswith("conv"):
        return False
    return role.shape is None or (len(role.shape) == 2 and role.shape[-1] % group_size == 0)

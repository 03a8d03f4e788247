"""The named schemes: small declarative records, by role and operator.

>>> from fastforward.selection import schemes
>>> schemes.get("w4_g128").weight.describe()
'int4 per group of 128, symmetric'

Names follow the field: ``w<bits>a<bits>``; ``w<bits>`` quantizes weights only; ``_g<n>`` one scale per ``n`` weights;
``_dynamic`` activation scales computed on each call. Everything outside the multiplying operators stays float.
"""

from __future__ import annotations

import difflib
import sys
from typing import TextIO

import torch

from fastforward.nn.quantizer import Quantizer
from fastforward.selection.formats import Format
from fastforward.selection.quantizers import all_quantizers
from fastforward.selection.scheme import REASON, Choice, Scheme

__all__ = ["Choice", "Format", "Scheme", "explain", "get", "names", "register"]

_SCHEMES: dict[str, Scheme] = {}


def register(scheme: Scheme, *, override: bool = False) -> Scheme:
    """Make a scheme known by its name.

    Raises:
        ValueError: The name is taken and `override` is not set.
    """
    if scheme.name in _SCHEMES and not override:
        msg = f"scheme {scheme.name!r} is already registered; pass override=True to replace it"
        raise ValueError(msg)
    _SCHEMES[scheme.name] = scheme
    return scheme


def names() -> list[str]:
    """The names of all schemes."""
    return sorted(_SCHEMES)


def get(name: str | Scheme) -> Scheme:
    """The scheme of that name; a scheme is returned as it is.

    Raises:
        ValueError: No scheme has that name; the message lists those that exist.
        TypeError: `name` is neither a string nor a scheme.
    """
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str):
        msg = f"a scheme is given by name or as a Scheme, not as {type(name).__name__}"
        raise TypeError(msg)
    if name not in _SCHEMES:
        near = difflib.get_close_matches(name, _SCHEMES, n=1)
        hint = f"; did you mean {near[0]!r}" if near else ""
        msg = f"unknown scheme {name!r}{hint}. Known schemes: {', '.join(names())}"
        raise ValueError(msg)
    return _SCHEMES[name]


def explain(model: torch.nn.Module, *, file: TextIO | None = None) -> list[Choice]:
    """Print what stands at each site of a model and why.

    Args:
        model: A model to which a scheme or configuration was applied.
        file: Where to print; standard output by default.

    Returns:
        The lines as records: site, quantizer (None for a stub) and reason.
    """
    choices = [_explained(name, module) for name, module in all_quantizers(model).named_modules()]
    rows = [(choice.site, _shown(choice.quantizer), choice.reason) for choice in choices]
    site_width = max((len(row[0]) for row in rows), default=0)
    kind_width = max((len(row[1]) for row in rows), default=0)
    for site, kind, reason in rows:
        print(f"{site:<{site_width}}  {kind:<{kind_width}}  {reason}", file=file or sys.stdout)
    return choices


def _explained(name: str, module: torch.nn.Module) -> Choice:
    assert isinstance(module, Quantizer)  # a collection of quantizers holds nothing else
    stub = module.is_stub()
    reason = getattr(module, REASON, "no scheme was applied" if stub else "set by hand")
    return Choice(name, None if stub else module, reason, module.quant_metadata)


def _shown(quantizer: Quantizer | None) -> str:
    if quantizer is None:
        return "float"
    bits = getattr(quantizer, "num_bits", None)
    return type(quantizer).__name__ + (f"({bits})" if bits is not None else "")


_W8, _W4 = Format(8, per="channel"), Format(4, per="channel")
_A8 = Format(8, symmetric=False)
_A8_TOKEN = Format(8, symmetric=False, per="token", dynamic=True)
# Measured on a sentence encoder: smoothing brings 5.7 dB of SQNR, rounding with error feedback and bias correction
# together 0.8 dB. Smoothing does nothing where activations have a scale per token.
_STATIC_STEPS = ("fold_batch_norm", "smooth", "round_weights", "correct_bias")
_DYNAMIC_STEPS = ("fold_batch_norm", "round_weights", "correct_bias")
# Without activations to round: 3 dB with four bits, nothing to be seen with eight.
_FEW_BITS_STEPS = ("round_weights", "correct_bias")


def _grouped(bits: int, size: int) -> Format:
    return Format(bits, per="group", group_size=size)


def _float8(dtype: str = "float8_e4m3fn", **fields: object) -> Format:
    return Format(dtype=dtype, **fields)  # type: ignore[arg-type]


for _scheme in (
    Scheme("w8a8", _W8, _A8, "static int8: weights per channel, activations per tensor", steps=_STATIC_STEPS),
    Scheme(
        "w8a8_dynamic",
        _W8,
        _A8_TOKEN,
        "int8 weights per channel, activations per token at run time",
        steps=_DYNAMIC_STEPS,
    ),
    Scheme("w8", _W8, None, "int8 weights per channel"),
    Scheme("w6", Format(6, per="channel"), None, "int6 weights per channel"),
    Scheme("w4", _W4, None, "int4 weights per channel", steps=_FEW_BITS_STEPS),
    Scheme("w4_g32", _grouped(4, 32), None, "int4 weights, one scale per 32", steps=_FEW_BITS_STEPS),
    Scheme("w4_g64", _grouped(4, 64), None, "int4 weights, one scale per 64", steps=_FEW_BITS_STEPS),
    Scheme("w4_g128", _grouped(4, 128), None, "int4 weights, one scale per 128", steps=_FEW_BITS_STEPS),
    Scheme("w3_g128", _grouped(3, 128), None, "int3 weights, one scale per 128", steps=_FEW_BITS_STEPS),
    Scheme("w2_g64", _grouped(2, 64), None, "int2 weights, one scale per 64", steps=_FEW_BITS_STEPS),
    Scheme("w4a8", _W4, _A8, "int4 weights per channel, static int8 activations", steps=_STATIC_STEPS),
    Scheme(
        "w4a8_dynamic",
        _W4,
        _A8_TOKEN,
        "int4 weights per channel, int8 activations per token at run time",
        steps=_DYNAMIC_STEPS,
    ),
    Scheme("w4a4", _W4, Format(4, symmetric=False), "static int4 weights and activations", steps=_STATIC_STEPS),
    Scheme("w8a16", _W8, Format(16, symmetric=False), "int8 weights per channel, static int16 activations"),
    Scheme("w16a16", Format(16, per="channel"), Format(16, symmetric=False), "static int16 weights and activations"),
    Scheme("a8", None, _A8, "static int8 activations per tensor"),
    Scheme("a8_dynamic", None, _A8_TOKEN, "int8 activations per token at run time"),
    Scheme("fp8", _float8(per="channel"), _float8(), "float8 e4m3: weights per channel, static activations per tensor"),
    Scheme(
        "fp8_dynamic",
        _float8(per="channel"),
        _float8(per="token", dynamic=True),
        "float8 e4m3: weights per channel, activations per token at run time",
    ),
    Scheme("fp8_weight", _float8(per="channel"), None, "float8 e4m3 weights per channel"),
    Scheme("fp8_e5m2", _float8("float8_e5m2", per="channel"), _float8("float8_e5m2"), "float8 e5m2, static"),
    Scheme("mxfp8", Format(block_format="mxfp8"), Format(block_format="mxfp8"), "OCP MX float8, blocks of 32"),
    Scheme("mxfp4", Format(block_format="mxfp4"), Format(block_format="mxfp4"), "OCP MX float4, blocks of 32"),
    Scheme("nvfp4", Format(block_format="nvfp4"), Format(block_format="nvfp4"), "NVFP4, blocks of 16"),
    Scheme("nf4", Format(block_format="nf4"), None, "4-bit normal-float weights, blocks of 64"),
):
    register(_scheme)

"""How many multiply-accumulates an operator of the table performs, from its arguments and result."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Arguments = Mapping[str, Any]


def multiply_accumulates(operator: str, arguments: Arguments, result: Any) -> int:
    """Return the multiply-accumulates of one call.

    Args:
        operator: Name in the operator table, of kind ``matmul``.
        arguments: Arguments by name.
        result: What the call returned.
    """
    out = _first_tensor(result)
    if out is None:
        return 0
    return int(_RULES.get(operator, _inner)(arguments, out))


def _first_tensor(result: Any) -> Tensor | None:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, (tuple, list)):
        return next((item for item in result if isinstance(item, Tensor)), None)
    return None


def _inner(arguments: Arguments, out: Tensor) -> int:
    """One accumulation over the last axis of the first tensor for each element of the result."""
    first = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    return out.numel() * (first.shape[-1] if first is not None and first.dim() else 1)


def _conv(arguments: Arguments, out: Tensor) -> int:
    weight = arguments["weight"]
    return out.numel() * int(weight.numel()) // int(weight.shape[0])


def _conv_transpose(arguments: Arguments, out: Tensor) -> int:
    weight = arguments["weight"]
    return int(arguments["input"].numel()) * int(weight.numel()) // int(weight.shape[0])


def _conv_tbc(arguments: Arguments, out: Tensor) -> int:
    weight = arguments["weight"]
    return out.numel() * int(weight.shape[0]) * int(weight.shape[1])


def _attention(arguments: Arguments, out: Tensor) -> int:
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    rows = int(query.numel()) // int(query.shape[-1])
    return rows * int(key.shape[-2]) * int(query.shape[-1] + value.shape[-1])


def _added(name: str, axis: int = -1) -> Callable[[Arguments, Tensor], int]:
    def count(arguments: Arguments, out: Tensor) -> int:
        return out.numel() * int(arguments[name].shape[axis])

    return count


def _addbmm(arguments: Arguments, out: Tensor) -> int:
    batches, _, inner = arguments["batch1"].shape
    return out.numel() * int(batches) * int(inner)


def _outer(arguments: Arguments, out: Tensor) -> int:
    return out.numel()


def _einsum(arguments: Arguments, out: Tensor) -> int:
    operands = arguments.get("operands", ())
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    equation = arguments.get("equation")
    if not isinstance(equation, str) or "." in equation:
        return out.numel() * max((int(o.shape[-1]) for o in operands if isinstance(o, Tensor)), default=1)
    sizes: dict[str, int] = {}
    for term, operand in zip(equation.partition("->")[0].replace(" ", "").split(","), operands, strict=False):
        sizes.update(zip(term, operand.shape, strict=False))
    return math.prod(sizes.values())


def _tensordot(arguments: Arguments, out: Tensor) -> int:
    a, b = arguments["a"], arguments["b"]
    return math.isqrt(max(a.numel() * b.numel() // max(out.numel(), 1), 1)) * out.numel()


def _recurrent(arguments: Arguments, out: Tensor) -> int:
    """Every weight matrix once per element of the batch and per step."""
    groups = (arguments.get("params"), [arguments.get("w_ih"), arguments.get("w_hh")])
    weights = [
        w for group in groups if group is not None for w in group if isinstance(w, torch.Tensor) and w.dim() == 2
    ]
    return sum(w.numel() for w in weights) * (out.numel() // max(int(out.shape[-1]), 1))


def _none(arguments: Arguments, out: Tensor) -> int:
    return 0


_RULES: Mapping[str, Callable[[Arguments, Tensor], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "deform_conv2d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("rnn_tanh", "rnn_relu", "gru", "lstm"), _recurrent),
    **dict.fromkeys(("rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell"), _recurrent),
    **dict.fromkeys(("outer", "addr", "kron"), _outer),
    **dict.fromkeys(("embedding", "embedding_bag"), _none),
    "conv_tbc": _conv_tbc,
    "scaled_dot_product_attention": _attention,
    "addmm": _added("mat1"),
    "addmv": _added("mat"),
    "baddbmm": _added("batch1"),
    "addbmm": _addbmm,
    "einsum": _einsum,
    "tensordot": _tensordot,
}

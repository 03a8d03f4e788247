"""A bounded sample of what multiplying operators were given, so that their output can be computed again.

Candidates for a quantizer are judged by the error they cause at the operator's output. That takes operands: for a
linear layer a sample of rows, for others the first entries of the batch.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastforward.autoquant.optable import Operator, resolve
from fastforward.calibration.flow import Site
from fastforward.calibration.trace import Trace

ROWS = 2048
"""Most rows of a linear layer's input that are kept."""
ELEMENTS = 1 << 22
"""Most elements that are kept of the operands of one site."""

Cut = Callable[[dict[str, Any], int], "dict[str, Any] | None"]


@dataclasses.dataclass(frozen=True)
class SampledCall:
    """The arguments of one call, by name: activations cut to size, parameters by reference."""

    operator: Operator
    arguments: Mapping[str, Any]

    def run(self, **replaced: Tensor) -> Tensor:
        """The operator's output, with some arguments replaced; half-precision operands are computed in float32."""
        function = resolve(self.operator.fallback)
        assert function is not None  # a row of the table that has just been called
        arguments = {**self.arguments, **replaced}
        result: Tensor = function(**{name: _precise(value) for name, value in arguments.items()})
        return result

    def thinned(self, rows: int) -> "SampledCall":
        """The same call of a linear layer with at most ``rows`` rows; of other operators, the call itself."""
        x = self.arguments["input"] if self.operator.identifier == "linear" else None
        if x is None or x.shape[0] <= rows:
            return self
        return SampledCall(self.operator, {**self.arguments, "input": x[:: -(-x.shape[0] // rows)]})


def _precise(value: Any) -> Any:
    """Errors of quantization are not to be told from those of a half-precision sum."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return type(value)(map(_precise, value)) if type(value) in (list, tuple) else value


class Samples:
    """Collects calls while a :class:`~fastforward.calibration.recorder.FlowRecorder` records.

    Args:
        batches: How many batches will come, as far as is known: each gives its share of the rows.
    """

    def __init__(self, batches: int = 1) -> None:
        self.calls: dict[int, list[SampledCall]] = {}
        self._elements: dict[int, int] = {}
        self._rows_per_call = max(32, -(-ROWS // max(batches, 1)))
        self._rows: dict[tuple[int, int], Tensor] = {}

    def operator_ran(
        self, site: Site, function: Any, operator: Operator, arguments: dict[str, Any], traces: Mapping[str, Trace]
    ) -> None:
        """Keep a part of this call, as long as the site's limit is not reached."""
        room = ELEMENTS - self._elements.get(site.number, 0)
        if room <= 0 or operator.identifier not in _CUTS and operator.identifier != "linear":
            return
        if operator.identifier == "linear":
            cut = self._linear_rows(site, arguments, traces)
        else:
            cut = _CUTS[operator.identifier](arguments, room // 2)
        if cut is not None:
            kept = {name: _own(value) for name, value in cut.items()}
            self.calls.setdefault(site.number, []).append(SampledCall(operator, kept))
            taken = sum(
                v.numel() for v in kept.values() if isinstance(v, Tensor) and not isinstance(v, torch.nn.Parameter)
            )
            self._elements[site.number] = self._elements.get(site.number, 0) + taken

    # ------------------------------------------------------------------ following a changed model
    def refer_to(self, site: Site, weight: Tensor) -> bool:
        """Whether the calls hold ``weight`` itself, and with it what has been changed in place since."""
        memory = weight.untyped_storage().data_ptr()
        held = (call.arguments["weight"] for call in self.calls.get(site.number, ()))
        return all(isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory for value in held)

    def replace(self, site: Site, **arguments: Any) -> None:
        """Give other values to some arguments of all calls of a site."""
        calls = self.calls.get(site.number, [])
        calls[:] = [SampledCall(call.operator, {**call.arguments, **arguments}) for call in calls]

    def divide_inputs(self, sites: Iterable[Site], divisor: Tensor) -> None:
        """Divide the inputs of linear layers, which may share them, once."""
        inputs = (call.arguments["input"] for site in sites for call in self.calls.get(site.number, ()))
        for rows in {rows.data_ptr(): rows for rows in inputs}.values():
            rows.div_(divisor)

    # ------------------------------------------------------------------ taking a part
    def _linear_rows(self, site: Site, arguments: dict[str, Any], traces: Mapping[str, Trace]) -> dict[str, Any] | None:
        x = arguments["input"]
        taken = sum(int(call.arguments["input"].shape[0]) for call in self.calls.get(site.number, ()))
        limit = min(self._rows_per_call, ROWS - taken, ELEMENTS // max(int(x.shape[-1]), 1))
        if limit <= 0:
            return None
        key = traces["input"].value, limit  # layers that share an input share the sample
        if key not in self._rows:
            shape = math.prod(x.shape[:-1]), x.shape[-1]  # not -1, which says nothing of a tensor without elements
            rows = x.detach().reshape(shape)
            self._rows[key] = _some_rows(rows, limit)
        return {**arguments, "input": self._rows[key]}


def _some_rows(rows: Tensor, limit: int) -> Tensor:
    """At most ``limit`` rows, spread over all, as a copy."""
    if rows.shape[0] <= limit:
        return rows.clone()
    generator = torch.Generator().manual_seed(rows.shape[0])
    chosen = torch.randperm(rows.shape[0], generator=generator)[:limit].sort().values
    return rows[chosen.to(rows.device)]


def _own(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
        return value
    return value.detach()


def _first_of_batch(names: tuple[str, ...]) -> Cut:
    """Cut the first axis of the named operands, and of every tensor that goes along it."""

    def cut(arguments: dict[str, Any], room: int) -> dict[str, Any] | None:
        lead = arguments[names[0]]
        if any(arguments[name].dim() != lead.dim() or arguments[name].shape[0] != lead.shape[0] for name in names):
            return dict(arguments) if _numel(arguments) <= room else None
        batch = int(lead.shape[0])
        keep = min(batch, room * batch // max(_numel(arguments), 1))
        weight = arguments.get("weight")
        without_batch = lead.dim() < 3 or (isinstance(weight, Tensor) and lead.dim() < weight.dim())
        if keep < 1 or without_batch:
            return dict(arguments) if _numel(arguments) <= room else None
        return {
            name: value[:keep].clone()
            if isinstance(value, Tensor)
            and not isinstance(value, torch.nn.Parameter)
            and value.dim() == lead.dim()
            and value.shape[0] == batch
            and name not in ("weight", "bias")
            else value
            for name, value in arguments.items()
        }

    return cut


def _numel(arguments: Mapping[str, Any]) -> int:
    return sum(v.numel() for v in arguments.values() if isinstance(v, Tensor) and not isinstance(v, torch.nn.Parameter))


_CUTS: Mapping[str, Cut] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _first_of_batch(("input",))),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _first_of_batch(("input",))),
    "matmul": _first_of_batch(("input", "other")),
    "bmm": _first_of_batch(("input", "mat2")),
    "mm": _first_of_batch(("input", "mat2")),
    "scaled_dot_product_attention": _first_of_batch(("query", "key", "value")),
}

"""Coverage: each operator that a run executes, whether it works on quantized operands, and if not, why.

An operand counts as quantized when it really came out of an active quantizer, with only data movement in between, or
when an integer layer multiplied it.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastforward.calibration.batches import Call, as_call
from fastforward.calibration.flow import Flow, Operand, Site, eager, in_eval_mode
from fastforward.calibration.recorder import FlowRecorder
from fastforward.diagnostics.table import html_table, text_table
from fastforward.exceptions import QuantizationError
from fastforward.integer.explaining import FLOAT_WINS
from fastforward.integer.layer import IntegerLayer
from fastforward.integer.own_weights import rounding_of
from fastforward.integer.packed_linear import PackedLinear
from fastforward.integer.weight_only import WeightOnlyLinear
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.quantizer import Quantizer
from fastforward.selection.scheme import REASON

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_INTEGER_REASON = "_ff_float_reason"  # what fastforward.integer.forms notes on a layer that stays simulated


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One operator at one place.

    Attributes:
        operator: Its name.
        module: Path of the module that ran it.
        place: File and line in the user's source.
        mode: ``"integer"``, ``"simulated"`` or ``"float"``.
        reason: Why it is not quantized, or not integer; empty if there is nothing to say.
        macs: Multiply-accumulates of the run.
        share: Their share of all.
    """

    operator: str
    module: str
    place: str
    mode: str
    reason: str
    macs: int
    share: float

    @property
    def quantized(self) -> bool:
        """Whether all multiplied operands are quantized."""
        return self.mode != "float"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What :func:`coverage` found; ``str()`` of it is a table.

    Attributes:
        rows: Every operator, in order of its first call.
        unreached: Places of multiplying operators that the run did not reach.
    """

    rows: tuple[CoverageRow, ...]
    unreached: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the run."""
        return sum(row.macs for row in self.rows)

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates whose operands are all quantized, 0 to 1."""
        return sum(row.share for row in self.rows if row.quantized)

    @property
    def integer_share(self) -> float:
        """Share of the multiply-accumulates that integer layers ran."""
        return sum(row.share for row in self.rows if row.mode == "integer")

    @property
    def multiplying(self) -> tuple[CoverageRow, ...]:
        """The rows that multiply and accumulate."""
        return tuple(row for row in self.rows if row.macs)

    def require(self, share: float) -> "Coverage":
        """Return this, or raise QuantizationError if less than ``share`` of the multiply-accumulates are quantized."""
        if self.share < share:
            float_rows = sorted((row for row in self.multiplying if not row.quantized), key=lambda row: -row.macs)
            worst = "; ".join(
                f"{row.operator} at {row.place} ({row.share:.1%}): {row.reason}" for row in float_rows[:5]
            )
            msg = (
                f"{self.share:.1%} of the multiply-accumulates are quantized, {share:.1%} are required. Float: {worst}"
            )
            raise QuantizationError(msg)
        return self

    def summary(self, name: str = "") -> str:
        """A few lines: how much is quantized, and what is not."""
        done = [row for row in self.multiplying if row.quantized]
        lines = [
            f"{name + ': ' if name else ''}{self.share:.1%} of {self.macs:,} multiply-accumulates quantized"
            f" ({self.integer_share:.1%} integer), {len(done)} of {len(self.multiplying)} operators"
        ]
        for row in self.multiplying:
            if not row.quantized:
                lines.append(
                    f"  float: {row.operator} at {_short(row.place)} in {row.module or 'the model'}: {row.reason}"
                )
        others = {row.operator for row in self.rows if not row.macs and not row.quantized}
        if others:
            lines.append(f"  float, nothing multiplied: {', '.join(sorted(others))}")
        if self.unreached:
            lines.append(f"  never reached: {', '.join(self.unreached)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{text_table(_HEAD, self._cells())}\n{self.summary()}"

    def to_html(self) -> str:
        """The table as a piece of HTML."""
        return html_table(_HEAD, self._cells(), classes=[row.mode for row in self.rows])

    def _cells(self) -> Iterable[tuple[str, ...]]:
        for row in self.rows:
            share = f"{row.share:.1%}" if row.macs else ""
            yield row.operator, row.module, _short(row.place), row.mode, share, row.reason


_HEAD = ("operator", "module", "source", "runs", "MACs", "why")


def coverage(model: torch.nn.Module, *inputs: Any, **keywords: Any) -> Coverage:
    """Run ``model(*inputs, **keywords)`` once and say which operators work on quantized operands.

    Args:
        model: A float, quantized or integer model; it runs in evaluation mode and without gradients.
        inputs: Its positional arguments; a single ``ff.Call`` or mapping stands for all arguments.
        keywords: Its keyword arguments.

    Returns:
        The table: print it, look at ``.rows`` and ``.share``, demand something of it with ``.require(0.95)``.

    Example:
        >>> import fastforward as ff, torch
        >>> float(ff.coverage(torch.nn.Linear(2, 2), torch.zeros(1, 2)).share)
        0.0
    """
    single = len(inputs) == 1 and not keywords and isinstance(inputs[0], (Call, Mapping))
    call = as_call(inputs[0]) if single else Call(inputs, keywords)
    inner = getattr(model, "_orig_mod", model)
    with in_eval_mode(inner), eager():
        return measure(inner, lambda: inner(*call.args, **call.kwargs))


def measure(model: torch.nn.Module, run: Callable[[], Any]) -> Coverage:
    """As :func:`coverage`, for anything that runs the model."""
    recorder = FlowRecorder(model, integer=integer_operator)
    with recorder:
        recorder.output(run())
    return from_flow(model, recorder.flow())


def from_flow(model: torch.nn.Module, flow: Flow) -> Coverage:
    """The coverage of a recorded run."""
    modules = dict(model.named_modules())
    total = max(flow.macs, 1)
    outside = {site.number for site in flow.outside}
    rows = []
    for site in flow.sites:
        if not site.multiplies and isinstance(modules.get(site.module), QuantizedLinear):
            continue  # the multiplication by the layer's own smoothing
        mode, reason = _state(site, modules, site.number in outside)
        rows.append(CoverageRow(site.operator, site.module, site.place, mode, reason, site.macs, site.macs / total))
    return Coverage(tuple(rows), unreached(model, flow))


def unreached(model: torch.nn.Module, flow: Flow) -> tuple[str, ...]:
    """Places where an operator would multiply, and that no tensor came through: file and line, or a layer's path.

    Branches inside torch are left out: which of its own ways torch takes is not the user's concern.
    """
    from fastforward.selection.roles import role_from_metadata

    places: dict[str, None] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not isinstance(module, Quantizer) or name in flow.reached or not role_from_metadata(module.quant_metadata):
            continue
        owner = name.rpartition(".")[0]
        file, line = module.quant_metadata.file, module.quant_metadata.line
        if file is not None and not file.startswith(_TORCH):
            places[_short(f"{file}:{line}")] = None
        elif file is None and not _read(modules[owner], flow):
            places[owner or "the model"] = None
    return tuple(places)


def _read(module: torch.nn.Module, flow: Flow) -> bool:
    """Whether the run read a parameter of this very module, whoever did."""
    return any(id(parameter) in flow.parameters for parameter in module.parameters(recurse=False))


def _chose_floats(module: Any) -> bool:
    """Whether a layer has an integer form but computes in floats, as measured."""
    has_integers = isinstance(module, IntegerLayer) or getattr(module, "holds_integers", False)
    return has_integers and integer_operator(module) is None


def integer_operator(module: torch.nn.Module) -> str | None:
    """The operator that an integer layer computes; ``None`` for any other module."""
    if isinstance(module, IntegerLayer):
        if module.record.kernel == "float":
            return None
        return type(module).__name__.removeprefix("Integer").lower().replace("transpose", "_transpose")
    if not getattr(module, "holds_integers", False):
        return None
    layer: Any = module
    operator, *_, kernel = layer.chain_link()
    return None if kernel == "float" else str(operator)


def _state(site: Site, modules: dict[str, torch.nn.Module], outside: bool) -> tuple[str, str]:
    if site.integer and isinstance(modules.get(site.module), WeightOnlyLinear | PackedLinear):
        return "float", "input stays float; the weight is stored as integers"
    if site.integer:
        return "integer", ""
    if _chose_floats(modules.get(site.module)):
        return "float", FLOAT_WINS
    if not site.operands:
        why = "outside any site: no stub sees its result" if outside else ""
        return "float", why
    missing = [_why_float(operand, modules) for operand in site.operands if not operand.active]
    if missing:
        return "float", "; ".join(dict.fromkeys(missing))
    if any(_gives_integers(operand, modules) for operand in site.operands):
        return "integer", ""
    return "simulated", str(getattr(modules.get(site.module), _INTEGER_REASON, ""))


def _gives_integers(operand: Operand, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether the operand is a weight whose products are integer ones."""
    quantizer = modules.get(operand.quantizer or "")
    rounding = rounding_of(quantizer) if operand.kind == "weight" and isinstance(quantizer, Quantizer) else None
    return rounding is not None and any(layer.record.kernel not in ("", "float") for layer in rounding.layers())


def _why_float(operand: Operand, modules: dict[str, torch.nn.Module]) -> str:
    if operand.quantizer is None:
        what = "comes from no site" if operand.kind == "activation" else "is a parameter that no site reads"
        return f"{operand.argument} {what}"
    reason = getattr(modules.get(operand.quantizer), REASON, "no quantizer at its site")
    return f"{operand.argument}: {reason}"


def _short(place: str) -> str:
    """A path relative to the working directory, or from its package on."""
    file, _, line = place.rpartition(":")
    if not file:
        return place
    for marker in ("site-packages/", "lib/python"):
        if marker in file:
            return f"{file.split(marker, 1)[1]}:{line}"
    relative = os.path.relpath(file)
    return place if relative.startswith("..") else f"{relative}:{line}"

"""Models under ``torch.compile(fullgraph=True)``: with stubs and with live quantizers they compute what they do eagerly.

Only models that compile so in float are asked. The backend is ``eager``: what is tested is that Dynamo traces rewritten code
without a break, and that the graph it captures is right; what a compiler makes of a graph is not the rewriter's.
"""

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

import fastforward as ff
from fastforward.selection import schemes
from tests.zoo.entry import Entry, Inputs
from tests.zoo.stubs import run
from tests.zoo.values import differences, same_values

BACKEND = "eager"


@dataclass
class CompileResult:
    """What was found for one model.

    Attributes:
        why_not: Reason why the float model does not compile; empty if it does.
        stubs: Where the compiled model with stubs differs from the eager float model.
        live: Where the compiled model with quantizers differs from the same model run eagerly.
    """

    why_not: str = ""
    stubs: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)


def check(entry: Entry) -> CompileResult:
    """Compile a model of the zoo in float, with stubs and with quantizers."""
    data = entry.arguments()
    expected = run(entry.make(), data).outputs
    if reason := why_not_compiled(entry, data, expected):
        return CompileResult(reason)
    result = CompileResult()
    result.stubs = _differences(ff.quantize_model(entry.make()), data, expected)
    if entry.multiplies:
        model = quickly_quantized(entry, data)
        result.live = _differences(model, data, run(model, data).outputs)
    return result


def why_not_compiled(entry: Entry, data: Inputs, expected: Any) -> str:
    """The reason why the float model does not compile to one graph that gives what is expected; empty if it does."""
    try:
        outputs = _compiled(entry.make(), data)
    except Exception as error:  # noqa: BLE001 - whatever keeps torch from compiling it is the reason
        return f"{type(error).__name__}: {_first_line(error)}"
    wrong = differences(expected, outputs, same=same_values)
    return "compiled, the float model itself differs from eager" if wrong else ""


def quickly_quantized(entry: Entry, data: Inputs) -> torch.nn.Module:
    """The model with W8A8's quantizers, by the least and largest values: without the steps that take long."""
    plain = dataclasses.replace(schemes.get("w8a8"), steps=(), observer="MinMax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ff.quantize(entry.make(), [ff.Call(*data)], scheme=plain, progress=False)


def _differences(model: torch.nn.Module, data: Inputs, expected: Any) -> list[str]:
    try:
        return differences(expected, _compiled(model, data), same=same_values)
    except Exception as error:  # noqa: BLE001 - a graph break is a finding
        return [f"{type(error).__name__}: {_first_line(error)}"]


def _compiled(model: torch.nn.Module, data: Inputs) -> Any:
    torch._dynamo.reset()
    try:
        return run(torch.compile(model, fullgraph=True, backend=BACKEND), data).outputs
    finally:
        torch._dynamo.reset()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]

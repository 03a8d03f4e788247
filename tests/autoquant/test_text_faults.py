"""Faults planted in the text form: each must make a case of `test_textform` fail."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastforward as ff
from fastforward.autoquant import helpers, imports, standalone, textform
from fastforward.nn import module as quantized_modules
from tests.autoquant import text_cases
from tests.autoquant.test_textform import attach, run, stubs, text_model

Rewriter, Standalone = textform.TextRewriter, standalone._Standalone


def moves_everything(self: Any, node: Any) -> Any:
    self.movable = True
    return Rewriter.visit(self, node)


FAULTS: dict[str, tuple[object, str, Callable[..., Any], type]] = {
    "parts move that must stay": (Rewriter, "fixed", moves_everything, text_cases.Unreached),
    "no name is rebound": (Rewriter, "rebinding", lambda self, definition: [], text_cases.Base),
    "operands stay float": (Rewriter, "operand", lambda self, node, site: node, text_cases.Base),
    "results stay float": (Rewriter, "functional", lambda self, o, s, a, k, plain: plain, text_cases.Base),
    "super is not spelled out": (
        Standalone,
        "visit_Call",
        lambda self, n: self.generic_visit(n),
        text_cases.SuperStays,
    ),
    "private names stay": (Standalone, "mangled", lambda self, name: name, text_cases.Base),
    "globals are not found": (imports.Imports, "expression", lambda self, name, names: None, text_cases.Helpers),
    "call paths share": (
        helpers.Callee,
        "name",
        lambda self, inner: f"quantizer_{self.unit.callee}",
        text_cases.Methods,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("owner", "name", "fault", "cls"), FAULTS.values(), ids=FAULTS)
def test_fault_is_caught(owner, name, fault, cls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_modules, "_module_map", dict(ff.nn.conversion.quantized_module_map()))
    assert agrees(cls, monkeypatch)
    monkeypatch.setattr(owner, name, fault)
    assert not agrees(cls, monkeypatch)


def agrees(cls: type, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the text form does what the float model and execution in memory do; an error is a no."""
    x = torch.linspace(-1, 2, 12).reshape(3, 4)
    model = cls()
    quantized_modules._module_map.pop(cls, None)
    memory = ff.quantize_model(copy.deepcopy(model))
    expected, log = run(model, x), list(text_cases.LOG)
    try:
        text = text_model(model)
        same = _equal(run(text, x), expected) and text_cases.LOG == log
        run(memory, x)
        shared = stubs(text) & stubs(memory)
        attach(text, shared)
        attach(memory, shared)
        return same and stubs(text) == stubs(memory) and _equal(run(text, x), run(memory, x))
    except Exception:
        return False


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))

"""The text form runs: with stubs it equals the float model, with quantizers it equals execution in memory."""

import copy
import sys

import pytest
import torch

import fastforward as ff
from fastforward.nn import module as quantized_modules
from tests.autoquant import text_cases
from tests.autoquant.text_cases import CASES

# A decorator's closure: the text calls it as it is.
KNOWN_AT_RUN_TIME = (text_cases.Decorated,)
IDS = [cls.__qualname__ for cls in CASES]


class Trace(ff.nn.Quantizer):
    """Scales a little: one that is left out, or applied twice, shows in the output, which rounding could hide."""

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 2**-7)


@pytest.fixture(autouse=True)
def _module_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated classes register themselves; here only for one test."""
    registered = dict(ff.nn.conversion.quantized_module_map())
    monkeypatch.setattr(quantized_modules, "_module_map", registered)


def text_model(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    """The model quantized with classes from its text form."""
    name = "tests_generated_text"
    sys.modules.pop(name, None)
    generated = ff.autoquantize(
        model, auto_import=True, code_writer=ff.autoquant.writer.BasicCodeWriter(name), **options
    )
    sys.modules.pop(name)
    classes = [cls for cls in vars(generated.pymodule).values() if isinstance(cls, type) and cls.__module__ == name]
    return ff.quantize_model(copy.deepcopy(model), extra_conversion={cls.float_class: cls for cls in classes})


def run(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(x))


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def stubs(model: torch.nn.Module) -> set[tuple[str, str]]:
    parts = ((path, part) for path, part in model.named_modules() if isinstance(part, ff.nn.QuantizedModule))
    return {(path, name) for path, part in parts for name in part.own_quantizers()}


def attach(model: torch.nn.Module, sites: set[tuple[str, str]]) -> None:
    parts = dict(model.named_modules())
    for path, name in sites:
        setattr(parts[path], name, Trace())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.linspace(-1, 2, 12).reshape(3, 4)


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "literals"])
@pytest.mark.parametrize("cls", CASES, ids=IDS)
def test_with_stubs_nothing_changes(cls: type, inference: bool, x: torch.Tensor) -> None:
    model = cls()
    expected, log = run(model, x), list(text_cases.LOG)
    quantized = text_model(model, use_type_inference=inference)
    actual = run(quantized, x)
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(actual, expected))
    assert text_cases.LOG == log, "evaluation order"


@pytest.mark.parametrize("cls", [cls for cls in CASES if cls not in KNOWN_AT_RUN_TIME])
def test_text_and_execution_agree_with_quantizers(cls: type, x: torch.Tensor) -> None:
    model = cls()
    expected = run(model, x)
    # In memory first: once the generated classes are imported, quantize_model would use them.
    memory = ff.quantize_model(copy.deepcopy(model))
    text = text_model(model)
    assert type(memory) is not type(text)
    run(memory, x)  # some stubs of the execution form appear on the first run
    shared = stubs(text) & stubs(memory)
    attach(text, shared)
    attach(memory, shared)
    from_text, from_memory = run(text, x), run(memory, x)
    assert all(torch.equal(one, other) for one, other in zip(from_text, from_memory))
    assert not all(torch.equal(one, other) for one, other in zip(from_text, expected)), "no quantizer was reached"


@pytest.mark.parametrize("cls", CASES, ids=IDS)
def test_text_and_execution_name_the_same_stubs(cls: type, x: torch.Tensor) -> None:
    model = cls()
    memory = ff.quantize_model(copy.deepcopy(model))
    run(memory, x)
    only_in_memory = stubs(memory) - stubs(text_model(model))
    assert bool(only_in_memory) == (cls in KNOWN_AT_RUN_TIME)


def test_stubs_of_text_are_those_of_execution_before_it_runs() -> None:
    model = text_cases.Methods()
    memory = stubs(ff.quantize_model(copy.deepcopy(model)))
    assert stubs(text_model(model)) == memory

"""What a compiled program of a rewritten model checks before every call, and what it notices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastforward as ff


def halved(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * 0.5)


def countdown(x: torch.Tensor, steps: int) -> torch.Tensor:
    return x if steps == 0 else countdown(x * 0.9, steps - 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps: list[Callable[..., Any]] = [torch.relu, torch.sigmoid]

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return halved(x) * 2 + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scaled(self.a(x)) + x
        for step in self.steps:
            x = step(x) + countdown(x, 2)
        return self.b(x)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 4)


def compiled(model: nn.Module) -> tuple[Any, list[str]]:
    """The compiled model, and what its programs read of their arguments, filled as they are made."""
    read: list[str] = []

    def note(guards: Any) -> None:
        read.extend(guard.name if isinstance(guard.name, str) else guard.name() for guard in guards)

    torch._dynamo.config.error_on_recompile = False
    return torch._dynamo.optimize("eager", nopython=True, guard_export_fn=note)(model), read


def stubs(x: torch.Tensor) -> Any:
    model = ff.quantize_model(Net()).eval()
    model(x)
    return model


def test_of_the_scopes_of_a_model_with_stubs_only_the_types_of_those_of_methods_are_checked(x: torch.Tensor) -> None:
    model = stubs(x)
    program, read = compiled(model)
    assert torch.equal(program(x), model(x))
    scopes = "L['self'].__dict__['_ff_scopes']"
    expected = {f"{scopes}['{method}']{end}" for method in ("forward", "scaled") for end in ("", ".compiled")}
    assert {name for name in read if "_ff_scopes" in name} == {scopes, *expected}


@pytest.mark.parametrize("operator", ["tanh", "add", "mul", "relu", "sigmoid"])
def test_a_quantizer_that_becomes_active_anywhere_is_noticed_and_one_that_goes_too(
    x: torch.Tensor, operator: str
) -> None:
    model = stubs(x)
    program, _ = compiled(model)
    before = program(x)
    found = [name for name, q in model.own_quantizers().items() if q.quant_metadata.operator == operator]
    assert found
    for name in found:
        stub = getattr(model, name)
        quantizer = ff.nn.LinearQuantizer(2)
        quantizer.quantization_range = (-0.3, 0.3)
        setattr(model, name, quantizer)
        assert torch.equal(program(x), model(x))
        assert not torch.equal(program(x), before)
        setattr(model, name, stub)
        assert torch.equal(program(x), before)


def test_a_quantizer_in_a_layer_below_is_noticed(x: torch.Tensor) -> None:
    model = stubs(x)
    program, _ = compiled(model)
    before = program(x)
    model.b.input_quantizer = ff.nn.LinearQuantizer(2)
    model.b.input_quantizer.quantization_range = (-1.0, 1.0)
    assert torch.equal(program(x), model(x))
    assert not torch.equal(program(x), before)


def test_a_quantizer_of_direct_calls_of_a_method_acts_on_these_alone(x: torch.Tensor) -> None:
    class Both(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scaled(x) + self.scaled(x * 2)

    model: Any = ff.quantize_model(Both()).eval()
    model(x), model.scaled(x)
    for name in [name for name, q in model.own_quantizers().items() if q.quant_metadata.operator == "mul"]:
        torch._dynamo.reset()
        stub = getattr(model, name)
        quantizer = ff.nn.LinearQuantizer(2)
        quantizer.quantization_range = (-0.3, 0.3)
        setattr(model, name, quantizer)
        assert torch.equal(compiled(model)[0](x), model(x))
        setattr(model, name, stub)


def test_operators_that_a_table_replaces_in_helpers_stay_replaced(x: torch.Tensor) -> None:
    table = ff.autoquant.OperatorTable.from_yaml()
    table.add("tanh(input: Quantized) -> Quantized", "torch.tanh", dispatch_op=lambda input, **_: input * 100)
    model: Any = ff.quantize_model(Net(), operator_table=table).eval()
    expected = model(x)
    assert torch.equal(compiled(model)[0](x), expected)
    assert not torch.equal(expected, Net().eval().requires_grad_(False)(x))


def test_a_program_for_any_number_of_elements_simulates_few_and_many() -> None:
    quantizer = ff.nn.LinearQuantizer(8)
    quantizer.quantization_range = (-1.0, 1.0)
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(graph)
        return graph

    program = torch.compile(quantizer, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows in (3, 200, 5000):
            x = torch.randn(rows, 7)
            torch.testing.assert_close(program(x), quantizer(x))
    assert len(made) == 1

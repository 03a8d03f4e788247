"""Functions that share their code: what a decorator puts around several functions, and what a factory returns."""

import functools
import inspect

import pytest
import torch
from torch import nn

import fastforward as ff
from fastforward.autoquant.optable import STR_ALIASES_EXTENSIONS, OperatorTable
from fastforward.autoquant.scope import Scope
from tests.autoquant.programs import load

DECORATED = """
import functools
import torch
from torch import nn

def scaled(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) * 2
    return wrapper

class First(nn.Module):
    @scaled
    def forward(self, x):
        return torch.relu(x) + x.exp()

class Second(nn.Module):
    @scaled
    def forward(self, x):
        return torch.sigmoid(x) - 1

@scaled
def one(x):
    return torch.tanh(x)

@scaled
def other(x):
    return torch.sin(one(x))

class Caller(nn.Module):
    def forward(self, x):
        return one(x) + other(x)
"""


def stubs(model: nn.Module) -> list[str]:
    assert isinstance(model, ff.nn.QuantizedModule)
    return list(model.own_quantizers())


@pytest.mark.parametrize("before", ["First", "Second", "Caller"])
@pytest.mark.parametrize("cls", ["First", "Second", "Caller"])
def test_stubs_do_not_depend_on_what_was_quantized_before(cls: str, before: str) -> None:
    alone = ff.quantize_model(vars(load(DECORATED))[cls]())
    module = load(DECORATED)
    ff.quantize_model(vars(module)[before]())(torch.randn(3))
    later = ff.quantize_model(vars(module)[cls]())
    assert stubs(later) == stubs(alone)
    later(torch.randn(3))
    assert stubs(later) == stubs(alone), "all were known before the first run"


def test_functions_below_one_decorator_have_quantizers_of_their_own() -> None:
    model = ff.quantize_model(load(DECORATED).Caller())
    model(torch.randn(3))
    names = stubs(model)
    assert {"quantizer_one_tanh", "quantizer_other_sin", "quantizer_other_one_tanh"} <= set(names)
    assert {"quantizer_one_mul", "quantizer_other_mul", "quantizer_other_one_mul"} <= set(names)


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return torch.relu(x.exp()) * function(self, x)

    return wrapper


def logged(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Doubled(nn.Module):
    @doubled
    @logged
    def forward(self, x):
        return torch.relu(x.sin())


def test_what_is_decorated_has_the_first_claim_to_a_name_and_the_same_as_in_text() -> None:
    model = ff.quantize_model(Doubled())
    lines, first = inspect.getsourcelines(Doubled)
    last = first + len(lines) - 1
    assert model.quantizer_relu.quant_metadata.line == last
    assert model.quantizer_relu_.quant_metadata.line < last
    assert "self.quantizer_relu:" in ff.autoquantize(Doubled()).code


def applying(function, factor):
    def apply(x):
        return function(x) + x * factor

    return apply


def squared(x):
    return x * x


class Free(nn.Module):
    def __init__(self, *functions) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x):
        return tuple(function(x) for function in self.functions)


@pytest.mark.parametrize("order", [1, -1])
def test_each_closure_calls_what_it_captured(order: int) -> None:
    functions = [applying(function, 2) for function in (torch.relu, squared, abs, nn.Softplus())][::order]
    x = torch.randn(5)
    model = ff.quantize_model(Free(*functions))
    assert all(map(torch.equal, model(x), Free(*functions)(x)))
    names = stubs(model)
    assert any("squared_mul" in name for name in names)
    assert any("relu" in name for name in names)
    assert any("abs" in name for name in names)


@pytest.mark.parametrize("values", [(2, torch.tensor(2.0)), (torch.tensor(2.0), 2)])
def test_a_captured_tensor_has_a_site_whatever_another_closure_captured(values) -> None:
    model = ff.quantize_model(Free(*(applying(torch.relu, value) for value in values)))
    model(torch.randn(5))
    assert any("factor" in name for name in stubs(model))


@logged
def helper(x):
    return x * 2


@logged
def special(x):
    return x * 3


def test_a_decorated_operator_of_the_table_is_one_whatever_was_decorated_alike() -> None:
    table = OperatorTable.from_yaml(alias_extensions=STR_ALIASES_EXTENSIONS)
    table.add("special(x: Quantized) -> Quantized", special, methods=())
    model = ff.quantize_model(Free(helper, special), operator_table=table)
    model(torch.randn(3))
    assert "quantizer_special_x" in stubs(model)
    assert any("helper_mul" in name for name in stubs(model))
    assert not any("special_mul" in name for name in stubs(model))


class Registry:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def chosen(self, x):
        return x * self.factor


class Louder(Registry):
    pass


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.registries = [Registry(2.0), Louder(3.0), Registry(5.0)]

    def forward(self, x):
        for registry in self.registries:
            x = registry.chosen(x)
        return x


def test_a_method_of_one_object_is_resolved_once_and_runs_on_the_object_at_hand(monkeypatch) -> None:
    model = ff.quantize_model(Asking())
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 30.0))
    model.registries = [Registry(7.0), Registry(11.0)]
    model(torch.ones(2))
    monkeypatch.setattr(Scope, "resolve", lambda *_: pytest.fail("resolved again"))
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 77.0))


MEANING_ITSELF = """
import functools
import torch
from torch import nn

class Base(nn.Module):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        forward = cls.forward

        @functools.wraps(forward)
        def wrapper(self, x, again=True):
            self.outermost = type(self).forward is wrapper
            if again:
                return wrapper(self, x * 2, again=False)
            return forward(self, x)

        cls.forward = wrapper

class Net(Base):
    def forward(self, x):
        return torch.relu(x) + x
"""


def test_a_method_that_compares_with_itself_or_calls_itself_means_its_rewritten_form() -> None:
    net = load(MEANING_ITSELF).Net()
    x = torch.randn(5)
    expected = net(x)
    assert net.outermost
    assert torch.equal(ff.quantize_model(net)(x), expected)
    assert net.outermost, "libraries ask so whether to checkpoint gradients"
    for name, _ in list(net.own_quantizers().items()):
        if "relu" in name:
            quantizer = ff.nn.LinearQuantizer(2)
            quantizer.quantization_range = (-1.0, 1.0)
            setattr(net, name, quantizer)
    assert not torch.equal(net(x), expected), "the call of itself is rewritten code as well"

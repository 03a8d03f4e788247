"""`fastforward.nn.functional`: one function per row of the operator table."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from fastforward.autoquant.optable import default_table, resolve
from fastforward.nn import functional

x, w, b = torch.linspace(-1, 1, 6).reshape(2, 3), torch.ones(4, 3), torch.zeros(4)


def halves(value):
    return value / 2


def test_every_row_has_a_function() -> None:
    rows = {row.identifier: row for row in default_table() if resolve(row.fallback) is not None}
    assert set(dir(functional)) == set(rows)
    for name, row in rows.items():
        function = getattr(functional, name)
        assert (
            function.__name__ == name
            and row.fallback in function.__doc__
            and function.__module__ == functional.__name__
        )
        keyword = inspect.signature(function).parameters["output_quantizer"]
        assert keyword.kind is keyword.KEYWORD_ONLY and keyword.default is None


CALLS = {
    "linear": ((x, w, b), {}, F.linear(x, w, b)),
    "softmax": ((x,), {"dim": -1}, F.softmax(x, dim=-1)),
    "add": ((x, 2), {}, x + 2),
    "add with alpha": ((x, x), {"alpha": 3}, torch.add(x, x, alpha=3)),
    "sub": ((1, x), {}, 1 - x),
    "pow": ((2.0, x), {}, 2.0**x),
    "negative": ((x,), {}, -x),
    "max": ((x,), {}, x.max()),
    "sum": ((x, -1), {}, x.sum(-1)),
    "cat": (([x, x],), {"dim": 1}, torch.cat([x, x], 1)),
    "einsum": (("ij,kj->ik", x, w), {}, torch.einsum("ij,kj->ik", x, w)),
    "relu": ((x,), {"inplace": False}, x.relu()),
}


@pytest.mark.parametrize(("args", "kwargs", "expected"), CALLS.values(), ids=CALLS)
def test_functions_compute_what_torch_does(args: tuple, kwargs: dict, expected: torch.Tensor, request) -> None:
    function = getattr(functional, request.node.callspec.id.split()[0])
    assert torch.equal(function(*args, **kwargs), expected)
    assert torch.equal(function(*args, **kwargs, output_quantizer=halves), expected / 2)


def test_operands_that_are_no_tensors_pass_through_the_plain_operator() -> None:
    assert functional.add([1], [2]) == [1, 2]
    assert functional.mul("a", 2) == "aa"
    assert functional.floor_divide(7, 2) == 3
    assert functional.bitwise_or(True, False) is True


def test_several_results_are_all_quantized() -> None:
    cell = torch.nn.LSTMCell(3, 4)
    args = x, (torch.zeros(2, 4), torch.zeros(2, 4)), cell.weight_ih, cell.weight_hh
    plain, halved = functional.lstm_cell(*args), functional.lstm_cell(*args, output_quantizer=halves)
    assert all(torch.equal(one / 2, other) for one, other in zip(plain, halved, strict=True))


def test_signature_is_the_schema_with_output_quantizer() -> None:
    assert list(inspect.signature(functional.linear).parameters) == ["input", "weight", "bias", "output_quantizer"]


@pytest.mark.parametrize("name", ["no_such_operator", "__wrapped__", "rows"])
def test_other_names_are_errors(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(functional, name)


def test_names_of_builtins_are_functionals_too() -> None:
    assert functional.abs(-3) == 3 and functional.round(2.6) == 3
    assert torch.equal(functional.all(x > -2), torch.tensor(True))

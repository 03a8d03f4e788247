"""Each construct of the language on four axes: same result, single evaluation, same order, same introspection."""

import ast
import inspect
import sys
import warnings
from typing import Any

import pytest
import torch

import fastforward as ff
from fastforward.autoquant.sites import Site
from fastforward.exceptions import QuantizationWarning
from tests.autoquant.construct_table import NEWER, available, source
from tests.autoquant.programs import compare, copying, load, observe, replace_stubs, rounding

PROGRAMS = available()
# Programs that can tell: what autograd saved is changed in place afterwards, or gradients are rounded in another order.
SEE_COPIES = {"in place then used", "autocast"}
# The float program has no gradient: it changes in place what autograd saved. With quantizers that is a copy.
NO_FLOAT_GRADIENT = {"in place then used"}


def _arguments() -> tuple[Any, ...]:
    torch.manual_seed(7)
    return (torch.randn(3, 4, requires_grad=True),)


@pytest.fixture(autouse=True)
def _nothing_stays_float() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        yield


@pytest.mark.parametrize("name", PROGRAMS)
def test_stubs_change_nothing(name: str) -> None:
    found = compare(PROGRAMS[name], _arguments)
    assert found == []


@pytest.mark.parametrize("name", [name for name in PROGRAMS if "drop" in PROGRAMS[name].partition("setup(self)")[2]])
def test_stubs_change_nothing_in_evaluation(name: str) -> None:
    found = compare(PROGRAMS[name], _arguments, training=False)
    assert found == []


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in SEE_COPIES])
def test_quantizers_that_only_copy_change_nothing(name: str) -> None:
    assert compare(PROGRAMS[name], _arguments, make=copying, exact=False) == []


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in NO_FLOAT_GRADIENT])
def test_it_runs_with_live_quantizers(name: str) -> None:
    expected, _, _ = _float(name)
    module = load(PROGRAMS[name])
    torch.manual_seed(0)
    model = ff.quantize_model(module.Net())
    observe(module, model, _arguments())
    replace_stubs(model, rounding)
    actual = observe(module, model, _arguments())
    assert [line.split(":")[0] for line in actual.error] == [line.split(":")[0] for line in expected.error]
    assert [tag for tag, _ in actual.log] == [tag for tag, _ in expected.log]


def _float(name: str) -> tuple[Any, Any, Any]:
    module = load(PROGRAMS[name])
    torch.manual_seed(0)
    model = module.Net()
    observe(module, model, _arguments())
    return observe(module, model, _arguments()), module, model


@pytest.mark.parametrize("name", ["traceback in a helper", "traceback of calls over several lines"])
def test_nothing_of_ours_stands_in_a_traceback_between_the_users_functions(name: str) -> None:
    model = ff.quantize_model(load(PROGRAMS[name]).Net())
    for _ in range(2):  # the first call looks for what is called
        with pytest.raises(RuntimeError) as raised:
            model(*_arguments())
    assert not [entry.path for entry in raised.traceback if "/fastforward/" in str(entry.path)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_companion_looks_like_the_class(name: str) -> None:
    module = load(PROGRAMS[name])
    model = ff.quantize_model(module.Net())
    mine, theirs = type(model).forward, module.Net.forward
    assert type(model) is not module.Net
    assert isinstance(model, module.Net)
    assert (type(model).__name__, type(model).__qualname__, type(model).__module__) == ("Net", "Net", module.__name__)
    assert inspect.signature(mine) == inspect.signature(theirs)
    assert inspect.getsource(mine) == inspect.getsource(theirs)
    assert (mine.__name__, mine.__qualname__, mine.__doc__) == (theirs.__name__, theirs.__qualname__, theirs.__doc__)
    assert mine.__code__.co_firstlineno == theirs.__code__.co_firstlineno
    assert mine.__code__.co_filename == theirs.__code__.co_filename
    assert mine.__code__.co_freevars == theirs.__code__.co_freevars
    assert _lines(mine.__code__) == _lines(theirs.__code__)


def _lines(code: Any) -> set[int]:
    inner = [_lines(constant) for constant in code.co_consts if hasattr(constant, "co_lines")]
    return {line for _, _, line in code.co_lines() if line is not None}.union(*inner)


def _kinds(of: type[ast.AST]) -> set[str]:
    return {cls.__name__ for cls in of.__subclasses__()}


def test_every_kind_of_statement_and_expression_is_in_the_table() -> None:
    seen = {type(node).__name__ for program in PROGRAMS.values() for node in ast.walk(ast.parse(program))}
    old = {"Num", "Str", "Bytes", "NameConstant", "Ellipsis", "TemplateStr", "Interpolation"}
    wanted = _kinds(ast.stmt) | _kinds(ast.expr) | _kinds(ast.pattern) | _kinds(ast.operator) | _kinds(ast.unaryop)
    missing = wanted | _kinds(ast.boolop) | _kinds(ast.cmpop)
    assert missing - seen - old == set()


@pytest.mark.parametrize("version", NEWER)
def test_newer_syntax_is_well_formed(version: tuple[int, int]) -> None:
    if sys.version_info < version:
        pytest.skip(f"syntax of Python {version[0]}.{version[1]}")
    for case in NEWER[version].values():
        ast.parse(source(case))


def test_sites_know_their_line() -> None:
    module = load(PROGRAMS["helper called twice"])
    model = ff.quantize_model(module.Net())
    lines = PROGRAMS["helper called twice"].splitlines()
    for name, stub in model.named_quantizers(skip_stubs=False):
        if name.startswith("quantizer"):
            assert stub.quant_metadata.file == module.__file__
            assert any(token in lines[stub.quant_metadata.line - 1] for token in ("*", "+", "def", "return")), (
                name,
                Site,
            )

"""Every section of the autoquant tutorial: its program runs, and its generated file is compared with the listing."""

import ast
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

import fastforward as ff
from fastforward.exceptions import AutoquantError
from tests.seeds.listing import differences, read_listing

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that programs run in as ``__main__``, which generated code can import from."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


@pytest.fixture
def run(main: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a program of the tutorial in an empty directory; returns the text of the file it wrote."""
    monkeypatch.chdir(tmp_path)

    def run_program(name: str) -> str:
        path = PROGRAMS / f"{name}.py"
        main.__file__ = str(path)
        exec(compile(path.read_text(), str(path), "exec"), main.__dict__)
        return (tmp_path / "quantized.py").read_text()

    return run_program


@pytest.fixture
def classes(main: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Imports the generated file; its classes leave the global module map afterwards."""
    from fastforward.nn import conversion, module

    monkeypatch.setattr(module, "_module_map", dict(conversion.quantized_module_map()))

    def load() -> dict[str, object]:
        return runpy.run_path(str(tmp_path / "quantized.py"), run_name="quantized")

    return load


def hoisted_reads_sorted(tree: ast.AST) -> ast.AST:
    """Slip: the listings read `self.bias` before `self.weight`; the source evaluates them the other way round."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            rows = [index for index, statement in enumerate(body) if _is_hoisted_read(statement)]
            ordered = sorted((body[index] for index in rows), key=ast.unparse)
            for index, statement in zip(rows, ordered):
                body[index] = statement
    return tree


def _is_hoisted_read(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]).startswith("self_")


def without_imports_of(tree: ast.Module, name: str) -> ast.Module:
    """Slip: the listings use `__main__` and `my_own` without importing them."""
    tree.body = [s for s in tree.body if not (isinstance(s, ast.Import) and s.names[0].name == name)]
    return tree


def without_annotations(tree: ast.Module) -> ast.Module:
    """Slip: the listing shows annotations that the program does not have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "quantized_helper":
            for argument in node.args.args:
                argument.annotation = None
    return tree


def functions_only(tree: ast.Module) -> ast.Module:
    """The sections about helpers show the helpers only."""
    tree.body = [statement for statement in tree.body if isinstance(statement, ast.FunctionDef)]
    return tree


def without_quantizer_of_y_(tree: ast.Module) -> ast.Module:
    """Slip: "the redundant quantizers for y and y_ disappear", says the text; the listing keeps that of y_."""
    helper = tree.body[0]
    helper.args.kwonlyargs = [argument for argument in helper.args.kwonlyargs if argument.arg != "quantizer_y_"]
    loop = next(statement for statement in helper.body if isinstance(statement, ast.For))
    loop.body = loop.body[1:]
    return tree


def test_basic_usage(run, classes) -> None:
    generated = ast.parse(run("basic"))
    assert differences(hoisted_reads_sorted(read_listing("basic")), hoisted_reads_sorted(generated)) == []
    model = sys.modules["__main__"].model
    float_output = model(torch.ones(2, 10))
    quantized = ff.quantize_model(model, extra_conversion={type(model): classes()["QuantizedMyLinear"]})
    assert torch.equal(quantized(torch.ones(2, 10)), float_output)
    quantized.quantizer_self_weight = ff.nn.LinearQuantizer(2)
    quantized.quantizer_self_weight.quantization_range = (-0.1, 0.1)
    assert not torch.equal(quantized(torch.ones(2, 10)), float_output)


def test_helper_functions(run, classes) -> None:
    # Slip: the program's `forward` reads an undefined `y`; rendering does not run it.
    generated = functions_only(ast.parse(run("helper_functions")))
    assert differences(read_listing("helper_functions"), generated) == []
    assert "QuantizedMyModuleWithHelper" in classes()


def test_annotations_without_inference(run, classes) -> None:
    generated = functions_only(ast.parse(run("annotations_without")))
    assert differences(without_annotations(read_listing("annotations_without")), generated) == []
    model = sys.modules["__main__"].model
    expected = model(torch.zeros(3))
    quantized = ff.quantize_model(model, extra_conversion={type(model): classes()["QuantizedMyModuleWithHelper"]})
    assert torch.equal(quantized(torch.zeros(3)), expected)


def test_annotations_with_inference(run) -> None:
    generated = functions_only(ast.parse(run("annotations_with")))
    assert differences(without_quantizer_of_y_(read_listing("annotations_with")), generated) == []


def test_missing_operator(run, classes) -> None:
    assert differences(read_listing("operator_missing"), ast.parse(run("operator_missing"))) == []
    assert "QuantizedMyBilinear" in classes()


def test_added_operator(run, classes) -> None:
    generated = without_imports_of(ast.parse(run("operator_added")), "__main__")
    assert differences(hoisted_reads_sorted(read_listing("operator_added")), hoisted_reads_sorted(generated)) == []
    model = sys.modules["__main__"].model
    inputs = torch.ones(2, 10), torch.ones(2, 10)
    expected = model(*inputs)
    quantized = ff.quantize_model(model, extra_conversion={type(model): classes()["QuantizedMyBilinear"]})
    assert torch.equal(quantized(*inputs), expected)


def test_replacement_patterns() -> None:
    from tests.autoquant.test_autoquant import ExampleModule1B

    rule = ff.autoquant.PatternRule.from_str(
        pattern="torch.nn.functional.{func}({a}, {b})", replacement="my_own.{func}({a}, {b})"
    )
    result = ff.autoquantize(ExampleModule1B(), use_type_inference=False, replacement_patterns=[rule])
    generated = without_imports_of(ast.parse(result.code), "my_own")
    assert differences(read_listing("replacement_patterns"), generated) == []


def test_a_replacement_that_cannot_be_resolved_is_an_error_when_imported() -> None:
    from tests.autoquant.test_autoquant import ExampleModule1B

    rule = ff.autoquant.PatternRule.from_str("torch.nn.functional.linear({a}, {b})", "my_own.linear({a}, {b})")
    with pytest.raises(AutoquantError, match="my_own"):
        ff.autoquantize(ExampleModule1B(), replacement_patterns=[rule], auto_import=True)


def test_nothing_is_written_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.autoquant.test_autoquant import ExampleModule1B

    monkeypatch.chdir(tmp_path)
    assert "QuantizedExampleModule1B" in ff.autoquantize(ExampleModule1B()).code
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_finds_what_differs() -> None:
    listing = read_listing("basic")
    for old, new in [("quantizer_linear", "quantizer_x"), ("self_bias,", ""), ("(self.bias)", "(self.weight)")]:
        text = ast.unparse(listing)
        assert old in text
        assert differences(listing, ast.parse(text.replace(old, new)))
    assert not differences(listing, ast.parse(ast.unparse(listing).replace("linear: ...", "linear: int")))

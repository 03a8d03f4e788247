"""`autoquantize` itself: its options, where its code goes, what evidence removes, and what it refuses."""

import ast
import functools
import inspect
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import fastforward as ff
from fastforward.autoquant.writer import BasicCodeWriter, FileWriter, StdoutWriter, TextIOWriter
from fastforward.exceptions import AutoquantError, QuantizationWarning
from fastforward.nn import module as quantized_modules
from fastforward.nn.module import stubs_live
from fastforward.nn.quantizer import recording
from tests.autoquant import text_cases


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) + 1


class Mixed(nn.Module):
    def forward(self, x, sizes, mode=None):
        total = sizes[0] + sizes[1]
        if mode is not None:
            x = torch.exp(x)
        return x * total


class Pragmas(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        y = x * 2  # ff: skip
        return F.linear(y, self.weight)  # ff: bits=4


class Changed(nn.Module):
    def forward(self, x):
        global _last
        _last = x * 2
        return _last


def body_of(code: str, cls: str, function: str = "forward") -> str:
    """The text of a method of a generated class, without its header."""
    tree = ast.parse(code)
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls)
    method = next(node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return "\n".join(ast.unparse(statement) for statement in method.body)


def stub_names(code: str) -> list[str]:
    lines = (line.strip() for line in code.splitlines())
    return [line.split(":")[0].removeprefix("self.") for line in lines if "QuantizerStub(" in line]


@pytest.fixture(autouse=True)
def _module_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_modules, "_module_map", dict(ff.nn.conversion.quantized_module_map()))


# ------------------------------------------------------------------ where code goes
def test_the_file_is_written_only_where_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "generated.py"
    result = ff.autoquantize(Net(), output_path=path)
    assert path.read_text() == result.code and result.pymodule is None and result.pymodule_name == "generated"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="force_overwrite"):
        ff.autoquantize(Net(), output_path=path)
    assert path.read_text() == "mine"
    ff.autoquantize(Net(), output_path=path, force_overwrite=True)
    assert path.read_text() == result.code
    assert [entry.name for entry in tmp_path.iterdir()] == ["generated.py"]


def test_a_path_without_suffix_is_a_package(tmp_path: Path) -> None:
    result = ff.autoquantize(Net(), output_path=tmp_path / "deep" / "package")
    assert (tmp_path / "deep" / "package" / "__init__.py").read_text() == result.code
    assert result.pymodule_name == "package"


def test_writers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    basic, stream = BasicCodeWriter("name"), io.StringIO()
    code = ff.autoquantize(Net(), code_writer=basic).code
    ff.autoquantize(Net(), code_writer=TextIOWriter("name", writer=stream))
    ff.autoquantize(Net(), code_writer=StdoutWriter("name"))
    ff.autoquantize(Net(), code_writer=FileWriter(tmp_path / "a.py"))
    assert basic.code == stream.getvalue() == capsys.readouterr().out == (tmp_path / "a.py").read_text() == code


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="torch.nn.Module"):
        ff.autoquantize(Net)
    with pytest.raises(ValueError, match="not both"):
        ff.autoquantize(Net(), output_path=tmp_path / "a.py", code_writer=BasicCodeWriter())
    with pytest.raises(ValueError, match="output_path"):
        ff.autoquantize(Net(), force_overwrite=True)


def test_auto_import_registers_the_module_and_its_classes() -> None:
    result = ff.autoquantize(Net(), auto_import=True, code_writer=BasicCodeWriter("tests_auto_imported"))
    assert sys.modules.pop("tests_auto_imported") is result.pymodule
    assert ff.nn.quantized_module_map()[Net] is result.pymodule.QuantizedNet
    model = ff.quantize_model(Net())
    assert type(model) is result.pymodule.QuantizedNet and isinstance(model.layer, ff.nn.QuantizedLinear)


def test_auto_import_says_when_it_replaces_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tests_replaced", object())
    with pytest.warns(QuantizationWarning, match="tests_replaced"):
        ff.autoquantize(Net(), auto_import=True, code_writer=BasicCodeWriter("tests_replaced"))


def test_the_model_is_not_changed() -> None:
    model = Net()
    before = dict(model.__dict__)
    ff.autoquantize(model, example_inputs=torch.ones(1, 2))
    assert type(model) is Net and model.__dict__ == before and type(model.layer) is nn.Linear
    assert Net not in ff.nn.quantized_module_map()


# ------------------------------------------------------------------ what is generated
def test_layers_with_a_hand_written_form_are_left_out() -> None:
    code = ff.autoquantize(nn.Sequential(Net(), nn.ReLU(), nn.Conv2d(1, 1, 1))).code
    assert [node.name for node in ast.parse(code).body if isinstance(node, ast.ClassDef)] == ["QuantizedNet"]


def test_classes_of_the_same_name_are_told_apart() -> None:
    code = ff.autoquantize(text_cases.Parent()).code
    classes = [node.name for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    assert classes == ["QuantizedParent", "QuantizedScale", "QuantizedScale_1"]
    assert "from tests.autoquant.text_helpers import Scale as Scale_1" in code


def test_pragmas() -> None:
    code = ff.autoquantize(Pragmas()).code
    assert "x * 2" in code
    assert "quantizer_mul" not in code
    assert "self.quantizer_self_weight: fastforward.nn.Quantizer" in code and code.count("bits=4") == 2


def test_stubs_carry_role_tags() -> None:
    result = ff.autoquantize(text_cases.Base(), auto_import=True, code_writer=BasicCodeWriter("tests_tags"))
    del sys.modules["tests_tags"]
    model = ff.quantize_model(text_cases.Base())
    assert type(model) is result.pymodule.QuantizedBase
    known = {name: (q.quant_metadata.tags, q.quant_metadata.operator) for name, q in model.own_quantizers().items()}
    assert known == {
        "quantizer_linear": (("activation/output",), "linear"),
        "quantizer_mul": (("activation/output",), "mul"),
        "quantizer_self_bias": (("parameter/bias",), None),
        "quantizer_self_weight": (("parameter/weight",), None),
        "quantizer_x": (("activation/input",), None),
    }
    found = ff.find_quantizers(model, "**/[quantizer:parameter/weight]")
    assert [result.full_name for result in found] == ["quantizer_self_weight"]


class Wrapping(nn.Module):
    def __init_subclass__(cls) -> None:
        forward = vars(cls).get("forward")
        if forward is not None:

            @functools.wraps(forward)
            def counted(self, *args):
                return forward(self, *args)

            cls.forward = counted


_documented: set[str] = set()


def documented_once(function):
    assert function.__qualname__ not in _documented, "a decorator with a side effect runs again"
    _documented.add(function.__qualname__)
    return function


class Wrapped(Wrapping):
    @documented_once
    def forward(self, x):
        return x * 2


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects do not know where they were defined")
def test_what_a_base_class_wraps_around_methods_is_no_decorator() -> None:
    generated = ff.autoquantize(Wrapped(), auto_import=True, code_writer=BasicCodeWriter("wrapped_once"))
    assert "documented_once" not in generated.code
    (listed,) = generated.verbatim
    line = Wrapping.__init_subclass__.__code__.co_firstlineno + 4
    assert listed.startswith(
        f"{__file__}:{line}: Wrapping.__init_subclass__.<locals>.counted is around forward of Wrapped"
    )
    model = ff.quantize_model(Wrapped(), extra_conversion={Wrapped: generated.pymodule.QuantizedWrapped})
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 2.0))


def replacing_forward(cls):
    forward = cls.forward

    @functools.wraps(forward)
    def doubled(self, x):
        return 2 * forward(self, x)

    cls.forward = doubled
    return cls


@replacing_forward
class Replaced(nn.Module):
    def forward(self, x):
        return x + 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Replaced()

    def forward(self, x):
        return self.inner(x) * 3


def test_a_class_whose_method_a_class_decorator_has_wrapped_is_left_out() -> None:
    with pytest.warns(QuantizationWarning, match="Replaced is left out: .*wraps forward from outside"):
        generated = ff.autoquantize(Outer(), auto_import=True, code_writer=BasicCodeWriter("replaced"))
    model = ff.quantize_model(Outer(), extra_conversion={Outer: generated.pymodule.QuantizedOuter})
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 12.0))
    with pytest.raises(AutoquantError, match="from outside"):
        ff.autoquantize(Replaced())


# ------------------------------------------------------------------ evidence
def test_evidence_removes_sites_that_saw_no_floating_tensor() -> None:
    without = ff.autoquantize(Mixed()).code
    assert "sizes[0] + sizes[1]" not in body_of(without, "QuantizedMixed")
    code = ff.autoquantize(Mixed(), example_inputs=(torch.ones(2), [1, 2])).code
    assert "total = sizes[0] + sizes[1]" in body_of(code, "QuantizedMixed")
    assert stub_names(code) == ["quantizer_mul", "quantizer_x"]


def test_evidence_keeps_what_a_tensor_reached() -> None:
    code = ff.autoquantize(Mixed(), example_inputs={"x": torch.ones(2), "sizes": torch.ones(2), "mode": 1}).code
    assert {"quantizer_add", "quantizer_exp", "quantizer_mul"} <= set(stub_names(code))


def scaled(x, factor):
    if factor is not None:
        return x * factor
    return x.exp()


class Paths(nn.Module):
    def forward(self, x, again: bool = False):
        y = scaled(x, x) + scaled(x, None) + self.shifted(x)
        if again:
            y = scaled(y, y) + self.shifted(y)
        return y

    def shifted(self, x):
        return x - 1

    def never_called(self, x):
        return x * x


def test_evidence_is_taken_for_each_call_path_by_itself() -> None:
    x = torch.randn(3)
    generated = ff.autoquantize(Paths(), example_inputs=x, auto_import=True, code_writer=BasicCodeWriter("by_path"))
    names = stub_names(generated.code)
    assert {"quantizer_scaled_mul_1", "quantizer_scaled_exp_2", "quantizer_shifted_sub_1"} <= set(names)
    assert not {"quantizer_scaled_mul_3", "quantizer_scaled_exp_3", "quantizer_never_called_mul"} & set(names)
    assert "quantizer_scaled_exp_1" not in names and "quantizer_scaled_mul_2" not in names
    assert "y = scaled(y, y)" in generated.code, "a call that evidence never saw stays as it is"
    model = ff.quantize_model(Paths(), extra_conversion={Paths: generated.pymodule.QuantizedPaths})
    assert torch.equal(model(x), Paths()(x))
    assert torch.equal(model(x, again=True), Paths()(x, again=True))
    stubs = [stub for stub in model.own_quantizers().values() if isinstance(stub, ff.nn.QuantizerStub)]
    seen = Seen()
    with stubs_live(model), recording(seen):
        model(x)
    assert seen.quantizers == {id(stub) for stub in stubs}


class Seen:
    def __init__(self) -> None:
        self.quantizers: set[int] = set()

    def record(self, quantizer, tensor_in: torch.Tensor, tensor_out: torch.Tensor) -> None:
        self.quantizers.add(id(quantizer))


def test_evidence_needs_a_class_that_a_module_can_import() -> None:
    class Local(nn.Module):
        def forward(self, x):
            return x * 2

    with pytest.raises(AutoquantError, match="cannot import"):
        ff.autoquantize(Local(), example_inputs=torch.ones(2))


def test_evidence_uses_no_randomness() -> None:
    model = nn.Sequential(Net(), nn.Dropout())
    state = torch.get_rng_state()
    ff.autoquantize(model, example_inputs=torch.ones(1, 2))
    assert torch.equal(state, torch.get_rng_state())


def misnamed(x, factor: int, size: "tuple[int, int]") -> float:
    return x * factor


class Misnamed(nn.Module):
    def forward(self, x, mode: str = "a"):
        return misnamed(x, x.mean(), x.shape)


def test_wrong_annotations_are_reported_with_their_line() -> None:
    line = misnamed.__code__.co_firstlineno
    with pytest.warns(QuantizationWarning) as caught:
        ff.autoquantize(Misnamed(), example_inputs=torch.ones(2, 2))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and all(f"test_autoquantize.py:{line}: " in message for message in messages)
    assert "parameter 'factor' of misnamed is annotated 'int'" in messages[0]
    assert "the result of misnamed is annotated 'float'" in messages[1]


def test_right_annotations_are_not_reported(recwarn: pytest.WarningsRecorder) -> None:
    ff.autoquantize(Mixed(), example_inputs=(torch.ones(2), [1, 2]))
    assert not [warning for warning in recwarn if warning.category is QuantizationWarning]


# ------------------------------------------------------------------ what stays float
class Unknown(nn.Module):
    def forward(self, x):
        y = torch.linalg.svdvals(x) + torch.zeros(1) + torch.arange(3).sum()
        return y.sort()[0] * x.size(0)


def test_unknown_operators_stay_and_are_listed() -> None:
    result = ff.autoquantize(Unknown())
    assert "torch.linalg.svdvals(x)" in result.code
    line = Unknown.forward.__code__.co_firstlineno + 1
    (listed,) = result.unknown_operators
    assert f"test_autoquantize.py:{line}: torch.linalg.svdvals " in listed
    assert ff.autoquantize(Net()).unknown_operators == ()


def test_an_operator_that_the_table_lacks_is_listed() -> None:
    table = ff.autoquant.OperatorTable()
    (listed,) = ff.autoquantize(Pragmas(), operator_table=table).unknown_operators
    assert "torch.nn.functional.linear has no row" in listed


ACTIVATIONS = {"relu": torch.relu}


def closed_over(factor):
    def scaled(x):
        return x * factor

    return scaled


captured = closed_over(2)


def even(x, depth):
    return x * 2 if depth == 0 else odd(x, depth - 1)


def odd(x, depth):
    return x + 1 if depth == 0 else even(x, depth - 1)


class Verbatim(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = torch.relu
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.missing = None
        self.kind = "relu"

    def step(self, x):
        return x * 2

    def forward(self, x):
        chosen = ACTIVATIONS[self.kind]
        x = chosen(x)
        x = ACTIVATIONS["relu"](x)
        x = self.act(x)
        x = captured(x)
        x = even(x, 3)
        x = torch.utils.checkpoint.checkpoint(self.step, x, use_reentrant=False)
        for index, layer in enumerate(self.layers):
            x = layer(x) + index
        first = self.layers[0]
        if self.missing is not None:
            x = self.missing(x)
        return self.step(first(x)) + nn.ReLU()(x) * len(str(self.kind))


def test_what_stays_as_it_is_is_listed_with_line_and_reason() -> None:
    listed = ff.autoquantize(Verbatim()).verbatim
    said = (entry.partition(": ")[2].partition("(...) stays as it is: ") for entry in listed)
    reasons = {callee: reason for callee, _, reason in said}
    closure = reasons.pop("captured")
    assert closure.endswith("uses variables of an enclosing function (factor) and cannot be written as text")
    assert reasons == {
        "chosen": "the callee is known only at run time",
        "ACTIVATIONS['relu']": "the callee is known only at run time",
        "self.act": "the callee is known only at run time",
        "torch.utils.checkpoint.checkpoint": "it calls Verbatim.step by itself",
        "even": "functions that call each other would need each other's quantizers",
    }
    lines, first = inspect.getsourcelines(Verbatim)
    chosen = first + next(n for n, line in enumerate(lines) if "x = chosen(x)" in line)
    assert any(entry.startswith(f"{__file__}:{chosen}: chosen(...)") for entry in listed)
    assert ff.autoquantize(Net()).verbatim == ()


def test_classes_and_methods_without_text_are_listed() -> None:
    with pytest.warns(QuantizationWarning):
        (listed,) = ff.autoquantize(nn.Sequential(Net(), Changed())).verbatim
    assert listed.startswith("Changed is left out: ") and "assigns globals" in listed


# ------------------------------------------------------------------ refusals
def test_what_cannot_be_text_is_named_with_its_line() -> None:
    with pytest.raises(AutoquantError, match=r"test_autoquantize.py:\d+: .*Changed.forward.*assigns globals"):
        ff.autoquantize(Changed())


def test_a_part_that_cannot_be_text_is_left_out_with_a_warning() -> None:
    with pytest.warns(QuantizationWarning, match="Changed is left out"):
        code = ff.autoquantize(nn.Sequential(Net(), Changed())).code
    assert "QuantizedNet" in code and "Changed" not in code


def test_a_local_class_has_text_but_no_importable_module(tmp_path: Path) -> None:
    class Local(nn.Module):
        def forward(self, x):
            return x + 1

    with pytest.warns(QuantizationWarning, match="Local"):
        assert "QuantizedLocal" in ff.autoquantize(Local()).code
    with pytest.raises(AutoquantError, match="top level"):
        ff.autoquantize(Local(), output_path=tmp_path / "a.py")
    assert not (tmp_path / "a.py").exists()


# ------------------------------------------------------------------ show_source
def test_show_source_prints_both_forms_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    ff.show_source(text_cases.scale)
    rows = [line.partition(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][0].strip() == "def scale(x, by=FACTOR):"
    right = "\n".join(row[2] for row in rows)
    assert "def quantized_scale(" in right
    ast.parse(right)


def test_show_source_takes_classes_instances_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    table = ff.autoquant.OperatorTable()
    for shown in (Net, Net()):
        ff.show_source(shown)
        assert "class QuantizedNet" in capsys.readouterr().out
    ff.show_source(Net, operator_table=table)
    assert "quantizer_add" not in capsys.readouterr().out
    with pytest.raises(TypeError, match="show_source"):
        ff.show_source(3)


def test_the_function_is_found_whatever_was_imported_before() -> None:
    import importlib

    for name in ("generate", "show", "patterns"):
        importlib.import_module(f"fastforward.autoquant.{name}")
    assert callable(ff.autoquant.autoquantize) and callable(ff.autoquantize) and callable(ff.show_source)

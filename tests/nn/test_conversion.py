"""quantize_model, dequantize_model, quantized: what they change, what they refuse, and what they leave alone."""

import functools
import subprocess
import sys
import types
import warnings

import pytest
import torch

import fastforward as ff
from fastforward.autoquant import OperatorTable, PatternRule
from fastforward.exceptions import AutoquantError, QuantizationError, QuantizationWarning, SourceMismatchError


class Net(torch.nn.Module):
    """Linear layer, helper and parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.gain = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(self.linear(x), self.gain)


def scaled(x, gain):
    return x * gain


class Failing(ff.nn.QuantizedModule, torch.nn.Softmin):
    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        self.input_quantizer = ff.nn.QuantizerStub()
        msg = "on purpose"
        raise ValueError(msg)


def test_the_model_stays_the_same_object_of_a_subclass() -> None:
    model, x = Net(), torch.randn(2, 4)
    expected = model(x)
    assert ff.quantize_model(model) is model
    assert isinstance(model, Net)
    assert isinstance(model, ff.nn.QuantizedModule)
    assert (type(model).__name__, type(model).__module__) == ("Net", __name__)
    assert torch.equal(model(x), expected)
    assert set(model.own_quantizers()) == {"quantizer_scaled_x", "quantizer_scaled_gain", "quantizer_scaled_mul"}


def test_dequantizing_restores_classes_and_attributes() -> None:
    model, reference = Net(), Net()
    ff.dequantize_model(ff.quantize_model(model))
    assert type(model) is Net
    assert type(model.linear) is torch.nn.Linear
    assert set(model.__dict__) == set(reference.__dict__)
    assert set(model.linear.__dict__) == set(reference.linear.__dict__)
    assert set(model.linear._buffers) == set(reference.linear._buffers)


def test_shared_submodules_are_swapped_once() -> None:
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    ff.quantize_model(model)
    assert model[0] is model[2]
    assert isinstance(model[0], ff.nn.QuantizedLinear)


def test_skip_and_extra_conversion_choose_modules() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.ReLU())
    ff.quantize_model(model, skip=["1"], extra_conversion={torch.nn.ReLU: ff.nn.conversion.SKIP_QUANTIZATION})
    assert isinstance(model[0], ff.nn.QuantizedLinear)
    assert type(model[1]) is torch.nn.Linear
    assert type(model[2]) is torch.nn.ReLU


def scripted() -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(torch.nn.ReLU())


def without_source() -> type[torch.nn.Module]:
    namespace: dict = {"torch": torch}
    exec("class Ghost(torch.nn.Module):\n    def forward(self, x):\n        return x + 1\n", namespace)
    return namespace["Ghost"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: 3, TypeError, "expected a torch.nn.Module"),
        (scripted, QuantizationError, "ScriptModule"),
        (lambda: ff.quantize_model(Net()), QuantizationError, "quantized already"),
        (lambda: torch.nn.Sequential(ff.quantize_model(Net())), QuantizationError, "module '0' .* quantized already"),
    ],
)
def test_bad_models_are_refused(make, error, message) -> None:  # noqa: ANN001
    with pytest.raises(error, match=message):
        ff.quantize_model(make())


def test_a_class_that_raises_leaves_the_model_as_it_was() -> None:
    model = torch.nn.Sequential(Net(), torch.nn.Linear(4, 4), torch.nn.Softmin(0))
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    with pytest.raises(ValueError, match="on purpose"):
        ff.quantize_model(model, extra_conversion={torch.nn.Softmin: Failing})
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before


def test_a_class_without_source_stays_float_and_says_so() -> None:
    model = torch.nn.Sequential(without_source()())
    with pytest.warns(QuantizationWarning, match="Ghost stays float.*no source"):
        ff.quantize_model(model)
    assert torch.equal(model(torch.zeros(1)), torch.ones(1))


def test_source_edited_since_import_is_noticed(tmp_path, monkeypatch) -> None:  # noqa: ANN001
    path = tmp_path / "edited_model.py"
    path.write_text("import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n        return x + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import edited_model

    path.write_text("import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n        return x + 2\n")
    with pytest.raises(SourceMismatchError, match="not the code that runs"):
        ff.quantizable(edited_model.M)
    with pytest.warns(QuantizationWarning, match="edited_model.py:3"):
        ff.quantize_model(edited_model.M())


def test_the_decorator_keeps_the_source_it_was_imported_with(tmp_path, monkeypatch) -> None:  # noqa: ANN001
    path = tmp_path / "decorated_model.py"
    text = (
        "import fastforward as ff, torch\n@ff.quantizable\nclass M(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x + 1\n"
    )
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import decorated_model

    path.write_text(text.replace("x + 1", "x + 2"))
    model = ff.quantize_model(decorated_model.M())
    assert "quantizer_add" in model.own_quantizers()
    assert torch.equal(model(torch.zeros(1)), torch.ones(1))


@pytest.mark.parametrize(
    ("obj", "error", "message"),
    [
        (len, AutoquantError, "builtin"),
        (lambda x: x, AutoquantError, "lambda"),
        (int, TypeError, "no torch.nn.Module"),
        (3, TypeError, "expected a module class or a function"),
        (functools.partial(scaled, gain=1), AutoquantError, "partial"),
    ],
)
def test_quantizable_refuses_what_has_no_source(obj, error, message) -> None:  # noqa: ANN001
    with pytest.raises(error, match=message):
        ff.quantizable(obj)


def test_quantizable_without_source_is_an_error() -> None:
    with pytest.raises(SourceMismatchError, match="no source"):
        ff.quantizable(without_source())


def test_decorator_options_reach_the_companion() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(x)

    class Decorated(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(x)

    rule = PatternRule.from_str(pattern="torch.exp({a})", replacement="torch.sin({a})")
    assert ff.quantizable(replacement_patterns=[rule])(Decorated) is Decorated
    assert torch.equal(Decorated()(torch.ones(1)), torch.ones(1).exp())
    model = ff.quantize_model(torch.nn.ModuleList([Plain(), Decorated()]))
    assert "quantizer_exp" in model[0].own_quantizers()
    assert "quantizer_sin" in model[1].own_quantizers()
    assert torch.equal(model[1](torch.ones(1)), torch.ones(1).sin())


def test_a_replacement_that_names_nothing_is_an_error() -> None:
    rule = PatternRule.from_str(pattern="scaled({a}, {b})", replacement="my_own.scaled({a}, {b})")
    model = Net()
    with pytest.raises(QuantizationError, match="my_own"):
        ff.quantize_model(model, replacement_patterns=[rule])
    assert type(model) is Net


def test_a_custom_table_decides_what_is_an_operator() -> None:
    calls = []

    def my_scaled(x, gain, *, output_quantizer):  # noqa: ANN001, ANN202
        calls.append(output_quantizer)
        return output_quantizer(x * gain)

    table = OperatorTable()
    table.add("scaled(x: Quantized, gain: Quantized) -> Quantized", scaled, dispatch_op=my_scaled)
    model = ff.quantize_model(Net(), operator_table=table)
    assert set(model.own_quantizers()) == {"quantizer__tmp", "quantizer_self_gain", "quantizer_scaled"}
    model(torch.zeros(1, 4))
    assert calls == [model.quantizer_scaled]


def test_instance_level_forward_is_rewritten_and_restored() -> None:
    model = Net()

    def doubled(self: Net, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * 2

    model.forward = types.MethodType(doubled, model)
    x = torch.randn(2, 4)
    expected, original = model(x), model.forward
    ff.quantize_model(model)
    assert "quantizer_instance_forward_mul" in model.own_quantizers()
    assert torch.equal(model(x), expected)
    ff.dequantize_model(model)
    assert model.forward is original


def test_a_function_becomes_a_module_that_owns_its_stubs() -> None:
    module = ff.quantized(scaled)
    assert set(module.own_quantizers()) == {"quantizer_x", "quantizer_gain", "quantizer_mul"}
    assert torch.equal(module(torch.ones(2), torch.full((2,), 3.0)), torch.full((2,), 3.0))
    with pytest.raises(TypeError, match="expected a Python function"):
        ff.quantized(3)


def test_pragmas_skip_a_line_or_choose_bits() -> None:
    class Pragmas(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.exp(x)  # ff: skip
            return torch.sin(y)  # ff: bits=4

    model = ff.quantize_model(Pragmas())
    assert "quantizer_exp" not in model.own_quantizers()
    assert model.quantizer_sin.quant_metadata.bits == 4


def test_no_fast_path_is_left_once_a_quantizer_is_attached() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = layer(x)
        ff.quantize_model(layer)
        assert torch.equal(layer(x), expected)
        quantizer = ff.nn.LinearQuantizer(2)
        quantizer.quantization_range = (-1.0, 1.0)
        layer.linear1.weight_quantizer = quantizer
        assert not torch.equal(layer(x), expected)


def test_a_compiler_may_be_the_first_to_use_an_operator() -> None:
    code = (
        "import sys, torch, fastforward as ff\n"
        "model = ff.quantize_model(torch.nn.Linear(4, 4))\n"
        "model.input_quantizer = quantizer = ff.nn.LinearQuantizer(num_bits=8)\n"
        "quantizer.quantization_range = (-1.0, 1.0)\n"
        "assert 'fastforward_kernels.ops' not in sys.modules\n"
        "x = torch.randn(2, 4)\n"
        "y = torch.compile(model, fullgraph=True, backend='eager')(x)\n"
        "assert torch.equal(y, model(x)) and 'fastforward_kernels.ops' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

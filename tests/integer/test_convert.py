"""convert(): what it accepts, refuses, measures, explains and saves."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from calibrated import Net, activation_quantizer, outputs, simulated

import fastforward as ff
from fastforward.exceptions import CalibrationError, QuantizationError

nn = torch.nn


def _model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    example = torch.randn(8, 32)
    return simulated(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)), example), example


def test_before_calibration_the_error_names_the_site_and_nothing_changes() -> None:
    model, example = _model()
    model[2].input_quantizer = ff.nn.LinearQuantizer(8)
    with pytest.raises(CalibrationError, match=r"2\.input_quantizer"):
        ff.convert(model)
    assert type(model[0]) is ff.nn.QuantizedLinear


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.Linear(4, 4)), lambda: nn.Sequential(ff.nn.QuantizedLinear(4, 4))]
)
def test_a_model_without_quantizers_is_refused(make: object) -> None:
    with pytest.raises(QuantizationError, match="has no quantizers"):
        ff.convert(make())


def test_converting_twice_is_refused() -> None:
    model, _ = _model()
    ff.convert(model)
    with pytest.raises(QuantizationError, match="is integer already"):
        ff.convert(model)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="onednn"):
        ff.convert(_model()[0], backend="fast")


def test_convert_returns_the_model_itself() -> None:
    model, _ = _model()
    assert ff.convert(model) is model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "input_quantizer", activation_quantizer(-1, 1, num_bits=16)), "16 bits"),
        (lambda layer: setattr(layer, "weight_quantizer", ff.nn.QuantizerStub()), "weight is not quantized"),
        (lambda layer: setattr(layer, "weight_quantizer", activation_quantizer(-1, 2)), "asymmetric"),
    ],
)
def test_what_has_no_integer_form_stays_simulated_and_says_why(change: object, reason: str) -> None:
    model, example = _model()
    change(model[0])
    expected = outputs(model, example)
    ff.convert(model)
    assert type(model[0]) is ff.nn.QuantizedLinear
    assert torch.allclose(outputs(model, example), expected, atol=0.05)
    (island,) = ff.integer.explain(model).islands
    assert island.path == "0"
    assert reason in island.reason


@pytest.mark.parametrize("style", ["tensor", "tuple", "mapping"])
def test_example_inputs_are_measured_and_learned_from(style: str) -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 32)
    net = Net(lambda self, x: self.b(torch.relu(self.a(x))), a=nn.Linear(32, 64), b=nn.Linear(64, 16))
    net.forward = net.forward
    model = simulated(net, example)
    inputs = {"tensor": example, "tuple": (example,), "mapping": {}}[style]
    if style == "mapping":
        net.forward = lambda x: net.b(torch.relu(net.a(x)))
        inputs = {"x": example}
    ff.convert(model, example_inputs=inputs)
    links = {link.path: link for link in ff.integer.explain(model).links}
    assert links["a"].kernel or links["a"].reason.startswith("float is faster")


def test_explain_prints_the_chain() -> None:
    model, example = _model()
    ff.convert(model)
    outputs(model, example, runs=2)
    text = str(ff.integer.explain(model))
    assert "linear + relu" in text
    assert "float32 -> uint8" in text
    assert "2 integer, 0 float or simulated" in text


class Attention(nn.Module):
    """Two products of activations, a norm, and a product that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate = Gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.gate(self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v))


class Gate(nn.Module):
    """A product that is no layer of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(x.transpose(1, 2), self.weight.unsqueeze(-1)).transpose(1, 2)


def test_explain_gives_a_reason_for_all_that_stays_float() -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 5, 16)
    model = nn.ModuleList([Attention(), nn.Linear(16, 4)]).eval()
    ff.quantize(model[0], [example], progress=False)
    model[1] = ff.nn.QuantizedLinear(16, 4)
    ff.convert(model)
    model[0](example)
    reasons = {(link.path, link.operator): link.reason for link in ff.integer.explain(model).islands}
    assert reasons.pop(("0.norm", "layernorm")).startswith("normalizes floats")
    assert reasons.pop(("1", "linear")) == "nothing of it is quantized"
    assert reasons.pop(("0", "matmul")).startswith("input, other rounded, computed in float: torch has no batched")
    assert "called by the module's own code" in reasons.pop(("0.gate", "conv1d"))
    assert not reasons
    assert {link.path for link in ff.integer.explain(model).integer} == {"0.qkv", "0.out"}


def test_supported_names_operators() -> None:
    assert {"linear", "conv2d", "embedding", "lstm, gru, rnn"} <= ff.integer.supported().keys()


@pytest.mark.parametrize("rebuilt", ["float", "simulated", "integer"])
def test_a_saved_integer_model_loads_into_the_same_model(rebuilt: str, tmp_path) -> None:
    torch.manual_seed(0)
    example = torch.randint(0, 20, (6,))

    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))

    plain = make()
    model = simulated(copy.deepcopy(plain), example)
    model[3].output_quantizer = activation_quantizer(-1.0, 1.0)
    saved = ff.convert(copy.deepcopy(model))
    path = ff.save_quantization(saved, tmp_path)
    target = {"float": plain, "simulated": model, "integer": copy.deepcopy(saved)}[rebuilt]
    if rebuilt == "float":
        target = ff.quantize_model(make())
    ff.load_quantization(target, path)
    assert torch.equal(outputs(target, example), outputs(saved, example))


def test_a_state_of_another_shape_is_refused(tmp_path) -> None:
    saved = ff.convert(_model()[0])
    path = ff.save_quantization(saved, tmp_path)
    other = ff.quantize_model(nn.Sequential(nn.Linear(32, 17), nn.ReLU(), nn.Linear(17, 8)))
    with pytest.raises(ff.exceptions.StateError, match="shape"):
        ff.load_quantization(other, path)
    assert type(other[0]) is ff.nn.QuantizedLinear


class Block(nn.Module):
    """Layers called by a rewritten ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_a_converted_model_of_rewritten_modules_can_be_copied(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (2, 12))
    model = ff.convert(ff.quantize(Block(), [tokens], progress=False))
    expected = outputs(model, tokens, runs=3)
    assert torch.equal(outputs(duplicate(model), tokens), expected)
    lower = outputs(duplicate(model).bfloat16(), tokens)
    assert lower.dtype == torch.bfloat16
    assert torch.allclose(lower.float(), expected, atol=0.1)


def test_an_integer_model_does_not_go_back_to_float() -> None:
    tokens = torch.randint(0, 20, (2, 12))
    model = ff.convert(ff.quantize(Block(), [tokens], progress=False))
    expected = outputs(model, tokens, runs=3)
    with pytest.raises(QuantizationError, match="3 layers hold integers \\(embed, up, down\\)"):
        ff.dequantize_model(model)
    assert torch.equal(outputs(model, tokens), expected)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_converted_convolutions_can_be_saved_whole(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layers = kind(4, 8, 3, padding=1), nn.ReLU(), kind(8, 4, 3)
    example = torch.randn(2, 4, *[6] * (layers[0].weight.dim() - 2))
    model = ff.convert(ff.quantize(nn.Sequential(*layers), [example], progress=False))
    expected = outputs(model, example, runs=3)
    assert torch.equal(outputs(_pickled(model), example), expected)

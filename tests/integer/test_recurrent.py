"""Recurrent layers whose gates are products of integers."""

import copy
from typing import Any

import pytest
import torch
from calibrated import activation_quantizer, close, weight_quantizer
from test_layers import FloatProducts
from torch.nn.utils.rnn import pack_padded_sequence

import fastforward as ff
from fastforward.integer import recurrent
from fastforward.nn.module import quantized_module_map

nn = torch.nn

LAYERS = {
    "lstm": lambda: nn.LSTM(8, 12),
    "lstm projected": lambda: nn.LSTM(8, 12, num_layers=2, proj_size=5),
    "lstm both ways": lambda: nn.LSTM(8, 12, num_layers=2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(8, 12, num_layers=2),
    "gru both ways, no bias": lambda: nn.GRU(8, 12, bidirectional=True, bias=False),
    "rnn": lambda: nn.RNN(8, 12),
    "rnn relu": lambda: nn.RNN(8, 12, nonlinearity="relu", num_layers=2),
}


def _simulated(name: str) -> Any:
    torch.manual_seed(0)
    layer: Any = LAYERS[name]()
    layer.__class__ = quantized_module_map()[type(layer)]
    layer.__init_quantization__()
    for attribute in list(layer.own_quantizers()):
        if attribute.startswith("weight"):
            weight = getattr(layer, attribute.replace("_quantizer", ""))
            setattr(layer, attribute, weight_quantizer(weight))
        elif attribute.startswith(("input", "hidden")):
            setattr(layer, attribute, activation_quantizer(-3.0, 3.0))
    return layer.eval()


def _flat(result: Any) -> list[torch.Tensor]:
    return [leaf + 0 for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _run(layer: nn.Module, *inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return _flat(tuple(layer(*inputs)))


@pytest.mark.parametrize("name", LAYERS)
def test_every_result_equals_simulation(name: str) -> None:
    layer = _simulated(name)
    example = torch.randn(5, 3, 8)
    expected = _run(layer, example)
    ff.convert(layer)
    with FloatProducts() as seen:
        actual = _run(layer, example)
    assert seen.found == []
    assert type(layer).__name__.startswith("Integer")
    # A hidden state that falls on the other side of a step goes on with it.
    assert all(torch.allclose(a, e, atol=0.03) for a, e in zip(actual, expected, strict=True))
    assert close(expected[0][0], actual[0][0]) or name == "lstm both ways"


def test_packed_sequences_and_initial_states() -> None:
    layer = _simulated("lstm")
    packed = pack_padded_sequence(torch.randn(5, 3, 8), torch.tensor([5, 2, 3]), enforce_sorted=False)
    inputs = (packed, (torch.randn(1, 3, 12), torch.randn(1, 3, 12)))
    expected = _run(layer, *inputs)
    assert all(torch.allclose(a, e, atol=0.03) for a, e in zip(_run(ff.convert(layer), *inputs), expected, strict=True))


def test_float_weights_are_released_or_kept() -> None:
    layer = _simulated("lstm")
    kept = ff.convert(copy.deepcopy(layer), keep_float=True)
    ff.convert(layer)
    assert {name for name, _ in layer.named_parameters()} == {"bias_ih_l0", "bias_hh_l0"}
    assert {name for name, _ in kept.named_parameters()} == {"bias_ih_l0", "bias_hh_l0", "weight_ih_l0", "weight_hh_l0"}
    assert not [weight for weight in layer._flat_weights if weight is not None and weight.dim() == 2]


@pytest.mark.parametrize("target", ["float", "simulated", "integer"])
@pytest.mark.parametrize("name", ["lstm projected", "gru both ways, no bias"])
def test_saving_and_loading(name: str, target: str, tmp_path) -> None:
    model, example = nn.Sequential(_simulated(name)), torch.randn(5, 3, 8)
    into = {"float": nn.Sequential(LAYERS[name]()), "simulated": copy.deepcopy(model)}.get(target)
    expected = _run(ff.convert(model)[0], example)
    into = copy.deepcopy(model) if into is None else ff.quantize_model(into) if target == "float" else into
    ff.load_quantization(into, ff.save_quantization(model, tmp_path))
    assert type(into[0]) is type(model[0])
    for other in (into, copy.deepcopy(model), model.to("cpu")):
        assert all(torch.equal(a, e) for a, e in zip(_run(other[0], example), expected, strict=True))


def test_a_state_of_another_shape_is_refused(tmp_path) -> None:
    path = ff.save_quantization(ff.convert(nn.Sequential(_simulated("lstm"))), tmp_path)
    with pytest.raises(ff.exceptions.StateError, match="shapes"):
        ff.load_quantization(ff.quantize_model(nn.Sequential(nn.LSTM(8, 13))), path)


@pytest.mark.parametrize(
    ("attribute", "quantizer", "reason"),
    [
        ("hidden_quantizer_l0", ff.nn.QuantizerStub(), "hidden_l0 is not quantized"),
        ("input_quantizer_l0", activation_quantizer(-1, 1, num_bits=16), "16 bits"),
        ("gates_quantizer_l0", activation_quantizer(-1, 1), "gates_quantizer_l0"),
    ],
)
def test_what_has_no_integer_form_stays_simulated(attribute: str, quantizer: object, reason: str) -> None:
    model = nn.Sequential(_simulated("lstm"))
    setattr(model[0], attribute, quantizer)
    ff.convert(model)
    assert reason in ff.integer.explain(model).islands[0].reason


def test_float_is_kept_where_it_is_faster_and_in_the_state(monkeypatch, tmp_path) -> None:
    model, example = nn.Sequential(_simulated("lstm projected")), torch.randn(5, 3, 8)
    target, dense = copy.deepcopy(model), LAYERS["lstm projected"]()
    dense.load_state_dict({name: getattr(model[0], name) for name in dense.state_dict()})
    monkeypatch.setattr(recurrent, "fastest", lambda ways: [way() for way in ways.values()] and "float")
    ff.convert(model, example_inputs=example)
    assert ff.integer.explain(model).islands[0].reason.startswith("float is faster")
    expected = _run(model[0], example)
    assert all(torch.allclose(a, e, atol=0.03) for a, e in zip(expected, _run(dense, example), strict=True))
    ff.load_quantization(target, ff.save_quantization(model, tmp_path))
    for other in (target, copy.deepcopy(model), model.to("cpu")):
        assert other[0].float_wins
        assert all(torch.equal(a, e) for a, e in zip(_run(other[0], example), expected, strict=True))


def test_a_quantized_network_is_integer_throughout() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.rnn, self.head = nn.Embedding(20, 8), nn.GRU(8, 12, batch_first=True), nn.Linear(12, 4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(self.embedding(tokens))[0])

    torch.manual_seed(0)
    data = [torch.randint(0, 20, (4, 6)) for _ in range(2)]
    model = ff.quantize(Tagger(), data, progress=False).eval()
    expected = _run(model, data[0])[0]
    ff.convert(model, backend="int_mm", example_inputs=data[0])
    assert torch.allclose(_run(model, data[0])[0], expected, atol=0.05)
    explanation = ff.integer.explain(model)
    assert [link.path for link in explanation.integer] == ["embedding", "rnn", "head"]
    assert not explanation.islands
    assert all("not run" not in link.kernel for link in explanation.links)

"""Transposed convolutions as ordinary ones, one set of channels per phase."""

import copy

import pytest
import torch
from calibrated import Net, close, outputs, simulated
from test_layers import FloatProducts

import fastforward as ff

nn = torch.nn

LAYERS = {
    "1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "1d strided, dilated": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2, padding=2), (2, 4, 9)),
    "2d twice": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 7)),
    "2d overlapping": (lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, bias=False), (2, 4, 5, 7)),
    "2d output padding": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 7)),
    "2d more than taps": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=4, output_padding=3), (2, 4, 5, 7)),
    "2d grouped": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), groups=2), (2, 4, 5, 7)),
    "2d depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4), (2, 4, 5, 7)),
    "2d unbatched": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 7)),
    "2d uneven": (lambda: nn.ConvTranspose2d(4, 6, (3, 5), (1, 3), (0, 2), (0, 2), dilation=(2, 1)), (2, 4, 5, 7)),
    "3d": (lambda: nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1), (2, 4, 3, 4, 5)),
}


def _models(name: str, num_bits: int = 8) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    example = torch.randn(shape) + 0.5
    model = simulated(nn.Sequential(make()), example * 0.8, num_bits=num_bits)
    return model, ff.convert(copy.deepcopy(model)), example


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_output_equals_simulation(name: str, num_bits: int) -> None:
    simulation, model, example = _models(name, num_bits)
    expected = outputs(simulation, example)
    with FloatProducts() as seen:
        actual = outputs(model, example, runs=3)
    assert seen.found == []
    assert "IntegerConvTranspose" in type(model[0]).__name__
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    assert close(expected, actual)


@pytest.mark.parametrize("size", [(9, 13), (10, 14), (10, 13)])
def test_an_output_size_is_kept(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 4, 5, 7)
    net = Net(lambda self, x: self.up(x, output_size=size), up=nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1))
    model = simulated(net, example)
    expected = outputs(model, example)
    assert expected.shape[2:] == size
    assert close(expected, outputs(ff.convert(model), example, runs=3))


def test_codes_flow_through_a_generator() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 8, 4, 4)
    layers = (nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.ReLU())
    model = simulated(nn.Sequential(*layers, nn.Conv2d(4, 3, 3)), example)
    expected = outputs(model, example)
    ff.convert(model)
    actual = outputs(model, example, runs=3)
    assert (expected - actual).square().sum() <= expected.square().sum() * 1e-4
    links = {link.path: (link.source, link.result, link.fused) for link in ff.integer.explain(model).integer}
    assert links["2"] == ("uint8", "uint8", ("relu",))
    assert links["4"][0] == "uint8"


def test_compiled_gives_the_same() -> None:
    _, model, example = _models("2d output padding")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert close(outputs(model, example), outputs(compiled, example))


def test_saving_loading_copying_and_moving(tmp_path) -> None:
    simulation, model, example = _models("2d grouped")
    expected, weight = outputs(model, example), simulation[0].weight_quantizer(simulation[0].weight)
    ff.load_quantization(simulation, ff.save_quantization(model, tmp_path))
    for other in (simulation, copy.deepcopy(model), model.to("cpu")):
        assert type(other[0]) is ff.integer.IntegerConvTranspose2d
        assert torch.equal(outputs(other, example), expected)
        assert torch.allclose(other[0].weight, weight)

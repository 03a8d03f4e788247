"""One integer layer computes what its simulation computes, and multiplies nothing but integers."""

import copy
import pickle
import runpy

import pytest
import torch
from calibrated import activation_quantizer, close, outputs, simulated
from fastforward_kernels import int_mm
from torch.utils._python_dispatch import TorchDispatchMode

import fastforward as ff
from fastforward.integer import IntegerLinear, onednn
from fastforward.integer.epilogue import GELU_TANH, HARDSWISH, NO_ACTIVATION, RELU, Activation
from fastforward.integer.grid import Grid

nn = torch.nn

LAYERS = {
    "linear": (lambda: nn.Linear(48, 40), (5, 48)),
    "linear 1 row": (lambda: nn.Linear(48, 40), (1, 48)),
    "linear 3d": (lambda: nn.Linear(48, 40), (2, 9, 48)),
    "linear vector": (lambda: nn.Linear(48, 40), (48,)),
    "linear odd, no bias": (lambda: nn.Linear(13, 7, bias=False), (11, 13)),
    "linear no rows": (lambda: nn.Linear(8, 4), (0, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3, padding=1), (2, 8, 20)),
    "conv2d rgb": (lambda: nn.Conv2d(3, 16, 3, padding=1), (2, 3, 12, 12)),
    "conv2d grouped, strided": (lambda: nn.Conv2d(8, 16, 3, stride=2, groups=4), (2, 8, 12, 12)),
    "conv2d depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), (2, 16, 12, 12)),
    "conv2d same, dilated": (lambda: nn.Conv2d(16, 16, 3, dilation=2, padding="same"), (2, 16, 12, 12)),
    "conv2d valid": (lambda: nn.Conv2d(4, 4, 2, padding="valid"), (2, 4, 6, 6)),
    "conv2d unbatched": (lambda: nn.Conv2d(16, 16, 1), (16, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), (2, 4, 6, 6, 6)),
}


class FloatProducts(TorchDispatchMode):
    """Collects matrix products and convolutions with a floating operand."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "mkldnn", "conv", "matmul", "mv", "dot")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        multiplies = any(part == name.strip("_").split("_")[0] or name == part for part in self.NAMES)
        codes = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if multiplies and codes is not None and codes.is_floating_point():
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_output_equals_simulation(name: str, num_bits: int, symmetric: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    example = torch.randn(shape) + 0.5
    model = nn.Sequential(make())
    if example.numel() == 0:
        model = simulated(model, torch.randn(3, 8), num_bits=num_bits, symmetric=symmetric)
    else:
        model = simulated(model, example * 0.8, num_bits=num_bits, symmetric=symmetric)
    expected = outputs(model, example)
    ff.convert(model)
    actual = outputs(model, example, runs=4)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    assert example.numel() == 0 or close(expected, actual)


@pytest.mark.parametrize("few", [False, True], ids=["many rows", "few rows"])
@pytest.mark.parametrize("name", [name for name in LAYERS if "no rows" not in name and "depthwise" not in name])
def test_zeros_give_zero_where_nothing_is_added(monkeypatch: pytest.MonkeyPatch, name: str, few: bool) -> None:
    """Programs may divide by the norm of the result, as cosine attention does for padded tokens."""
    monkeypatch.setattr(onednn, "SMALL_ROWS", 1 << 20 if few else 0)
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    model = ff.convert(simulated(nn.Sequential(layer), torch.randn(shape) + 0.5))
    y = outputs(model, torch.zeros(shape), runs=3)
    assert torch.equal(y, torch.zeros_like(y))


def test_the_detector_sees_float_products() -> None:
    with FloatProducts() as seen, torch.no_grad():
        nn.Linear(4, 4)(torch.randn(2, 4))
        nn.Conv2d(3, 4, 3)(torch.randn(1, 3, 8, 8))
        torch.randn(2, 3) @ torch.randn(3, 2)
    assert len(seen.found) == 3


@pytest.mark.parametrize("name", LAYERS)
def test_no_floating_product_inside(name: str) -> None:
    make, shape = LAYERS[name]
    example = torch.randn(shape) if 0 not in shape else torch.randn(3, *shape[1:])
    model = ff.convert(simulated(nn.Sequential(make()), example))
    with FloatProducts() as seen:
        outputs(model, example, runs=3)
    assert seen.found == []


@pytest.mark.parametrize("kernel", ["onednn", "int_mm", "kernels"])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_every_kernel_gives_the_same(kernel: str, rows: int) -> None:
    torch.manual_seed(0)
    example = torch.randn(rows, 64)
    model = simulated(nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 48)), example)
    expected = outputs(model, example)
    ff.convert(model, backend=kernel)
    assert model[0].backend == kernel
    assert close(expected, outputs(model, example, runs=3))


def test_smoothing_is_applied() -> None:
    torch.manual_seed(0)
    example = torch.randn(16, 32) * torch.logspace(-1, 1, 32)
    model = simulated(nn.Sequential(nn.Linear(32, 32)), example)
    model[0].smoothing = torch.logspace(-0.5, 0.5, 32)
    weight = model[0].weight * model[0].smoothing
    model[0].weight_quantizer.quantization_range = (weight.amin(1), weight.amax(1))
    expected = outputs(model, example)
    ff.convert(model)
    assert close(expected, outputs(model, example))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    example = torch.randn(16, 32)
    model = simulated(nn.Sequential(nn.Linear(32, 32)), example).to(dtype)
    expected = outputs(model, example.to(dtype))
    ff.convert(model)
    actual = outputs(model, example.to(dtype))
    assert actual.dtype == dtype
    assert torch.allclose(expected.float(), actual.float(), atol=0.02)


def test_an_output_quantizer_keeps_its_place() -> None:
    torch.manual_seed(0)
    example = torch.randn(16, 32)
    model = simulated(nn.Sequential(nn.Linear(32, 32)), example)
    model[0].output_quantizer = activation_quantizer(-1.0, 1.0)
    expected = outputs(model, example)
    ff.convert(model)
    steps = (outputs(model, example) - expected) * (1 / model[0].output_quantizer.scale)
    assert steps.abs().max() <= 1.01, "one step of the output's grid"
    assert (steps.abs() > 0.5).float().mean() < 0.01


def test_embedding_equals_simulation() -> None:
    model = simulated(nn.Sequential(nn.Embedding(20, 8)), torch.tensor([0, 19]))
    indices = torch.tensor([[1, 5], [19, 0]])
    expected = outputs(model, indices)
    ff.convert(model)
    assert torch.equal(outputs(model, indices), expected)


def test_float_weights_are_released_or_kept() -> None:
    example = torch.randn(4, 32)
    model = simulated(nn.Sequential(nn.Linear(32, 16)), example)
    kept = copy.deepcopy(model)
    weight = kept[0].weight
    ff.convert(model)
    ff.convert(kept, keep_float=True)
    assert [name for name, _ in model.named_parameters()] == ["0.bias"]
    assert model[0].weight_int8.dtype == torch.int8
    assert torch.allclose(model[0].weight, weight, atol=0.01), "computed from the integers when asked for"
    assert kept[0].weight is weight


def test_copies_and_pickles_compute_the_same() -> None:
    torch.manual_seed(0)
    example = torch.randn(64, 32)
    model = ff.convert(simulated(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)), example))
    expected = outputs(model, example, runs=3)
    assert torch.equal(outputs(copy.deepcopy(model), example), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), example), expected)


def test_moving_to_another_dtype_keeps_scales_and_integers() -> None:
    example = torch.randn(4, 32)
    model = ff.convert(simulated(nn.Sequential(nn.Linear(32, 16)), example)).to(torch.bfloat16)
    assert model[0].weight_scale.dtype == torch.float32
    assert model[0].weight_int8.dtype == torch.int8
    assert outputs(model, example.bfloat16()).dtype == torch.bfloat16


def test_gradients_to_the_input_are_not_needed() -> None:
    example = torch.randn(4, 32)
    model = ff.convert(simulated(nn.Sequential(nn.Linear(32, 16)), example))
    y = model(example.requires_grad_())
    assert not (y + 0).requires_grad


def test_a_layer_is_still_a_linear_layer() -> None:
    model = ff.convert(simulated(nn.Sequential(nn.Linear(32, 16)), torch.randn(4, 32)))
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]) is IntegerLinear
    assert model[0].out_features == 16
    assert model[0].weight.shape == (16, 32)


@pytest.mark.parametrize("to_codes", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize("activation", [NO_ACTIVATION, RELU, GELU_TANH, HARDSWISH], ids=lambda a: a.name)
def test_what_gpus_use_for_convolutions_computes_the_same(activation: Activation, to_codes: bool) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 8, 9, 9)
    model = ff.convert(simulated(nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)), example))
    layer = model[0]
    codes, out = layer.codes(example), Grid(0.02, 128) if to_codes else None
    expected = layer.compute(codes, layer.epilogue, activation, out)
    actual = layer._portable(codes, layer.epilogue, activation, out)
    assert actual.dtype == expected.dtype
    assert torch.allclose(actual.float(), expected.float(), atol=1 if to_codes else 1e-5)
    assert (actual != expected).float().mean() < 0.01 or not to_codes


@pytest.mark.parametrize("takes_uint8", [True, False])
@pytest.mark.parametrize("rows, depth, columns", [(32, 64, 48), (8, 1, 32), (1, 1, 5), (1, 3, 1)])
def test_plain_products_of_unsigned_and_signed_are_exact(
    takes_uint8: bool, rows: int, depth: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(int_mm, "TAKES_UINT8", takes_uint8 and int_mm.TAKES_UINT8)
    codes = torch.randint(0, 256, (rows, depth), dtype=torch.uint8)
    weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
    exact = (codes.double() @ weight.double().t()).int()
    out = torch.empty_like(exact)
    for product in (int_mm.int_mm(codes, weight.t()), int_mm.int_mm(codes, weight.t().contiguous(), out=out), out):
        assert torch.equal(product, exact)


def test_plain_products_are_for_few_rows_only_where_they_take_unsigned_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    for takes_uint8 in (True, False):
        monkeypatch.setattr(int_mm, "TAKES_UINT8", takes_uint8)
        found = runpy.run_path(onednn.__file__)
        assert (found["SMALL_ROWS"] > 0) == (found["FEW_ROWS"] > 0) == takes_uint8


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_layer_with_a_single_input_feature(rows: int) -> None:
    torch.manual_seed(0)
    example = torch.randn(rows, 1)
    model = simulated(nn.Sequential(nn.Linear(1, 32)), example)
    expected = outputs(model, example)
    torch.testing.assert_close(outputs(ff.convert(model), example, runs=3), expected, rtol=1e-5, atol=1e-6)

"""Stubs and quantizers: metadata, overrides, recording, state, learning, formats, switching."""

import copy
import pickle

import pytest
import torch

import fastforward as ff
from fastforward.exceptions import CalibrationError, QuantizationError
from fastforward.nn import (
    BlockFormatQuantizer,
    DynamicFloat8Quantizer,
    DynamicLinearQuantizer,
    Float8Quantizer,
    LinearQuantizer,
    Quantizer,
    QuantizerMetadata,
    QuantizerStub,
)
from fastforward.nn.quantizer import recording
from fastforward.quantization.granularity import PerChannel, PerGroup, PerTensor, PerToken


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(bits=8, **kwargs):
    quantizer = LinearQuantizer(bits, **kwargs)
    quantizer.quantization_range = (-1.0, 1.0)
    return quantizer


# ---------------------------------------------------------------------------------------------------------- metadata
def test_tags_are_hierarchical():
    metadata = QuantizerStub("parameter/weight").quant_metadata
    assert "parameter" in metadata
    assert "parameter/weight" in metadata
    assert "parameter/bias" not in metadata
    assert "param" not in metadata
    assert metadata.weight_quantizer
    assert metadata.parameter_quantizer
    assert not metadata.activation_quantizer


@pytest.mark.parametrize(
    ("keyword", "tag"),
    [
        ("weight_quantizer", "parameter/weight"),
        ("bias_quantizer", "parameter/bias"),
        ("input_quantizer", "activation/input"),
        ("output_quantizer", "activation/output"),
    ],
)
def test_roles_by_keyword(keyword, tag):
    stub = QuantizerStub(**{keyword: True})
    assert stub.quant_metadata.tags == (tag,)
    assert getattr(stub.quant_metadata, keyword)


def test_metadata_extension_and_description():
    wide, narrow = QuantizerMetadata(("activation",)), QuantizerMetadata(("activation/input",))
    assert narrow.is_extension(wide)
    assert not wide.is_extension(narrow)
    described = QuantizerMetadata(("activation/input",), "linear", "input", "model.py", 12).describe()
    assert described == "activation/input of linear(input) at model.py:12"


# ------------------------------------------------------------------------------------------------- stubs and passing
@pytest.mark.parametrize("value", [3, None, "text", [1, 2], torch.tensor([1, 2]), torch.tensor([True]), torch.randn(2)])
def test_a_stub_returns_what_it_is_given(value):
    assert QuantizerStub()(value) is value


@pytest.mark.parametrize("value", [3, None, [1.0], torch.tensor([1, 2]), torch.tensor([True]), torch.tensor([1j])])
@pytest.mark.parametrize("quantizer", [LinearQuantizer(8), Float8Quantizer(), DynamicLinearQuantizer(8)], ids=repr)
def test_quantizers_leave_other_values_alone(quantizer, value):
    assert quantizer(value) is value


def test_stub_has_everything_a_module_has():
    fresh = set(torch.nn.Module().__dict__)
    stub, other = QuantizerStub(), QuantizerStub()
    assert fresh <= set(stub.__dict__)
    assert stub._forward_hooks is not other._forward_hooks
    calls = []
    stub.register_forward_hook(lambda *a: calls.append(1))
    stub(torch.ones(1))
    other(torch.ones(1))
    assert calls == [1]


# ----------------------------------------------------------------------------------------------------------- overrides
def test_the_last_override_runs_first_and_may_go_on():
    quantizer, order = calibrated(), []

    def make(name):
        def override(context, inner, args, kwargs):
            assert context is quantizer
            order.append(name)
            return inner(*args, **kwargs) + 1

        return override

    quantizer.register_override(make("first"))
    handle = quantizer.register_override(make("second"))
    x = torch.tensor([0.5])
    plain = calibrated()(x)
    assert quantizer(x) == plain + 2
    assert order == ["second", "first"]
    handle.remove()
    handle.remove()
    assert quantizer(x) == plain + 1
    with quantizer.register_override(lambda q, inner, args, kwargs: args[0]):
        assert torch.equal(quantizer(x), x)
    assert len(quantizer.overrides) == 1


def test_owner_is_told_of_overrides():
    stub, told = QuantizerStub(), []
    stub._owner_changed = lambda: lambda: told.append(1)
    with stub.register_override(lambda q, inner, args, kwargs: args[0] * 2):
        assert told == [1]
        assert stub(torch.ones(1)) == 2
    assert told == [1, 1]


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps, lambda q: torch.save(q, "/dev/null")])
def test_overrides_are_not_copied_silently(copier):
    quantizer = calibrated()
    quantizer.register_override(lambda q, inner, args, kwargs: args[0])
    with pytest.raises(QuantizationError, match="override"):
        copier(quantizer)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_override_on_a_stub_of_a_layer_takes_effect(copier):
    """Layers skip their stubs while nothing is attached to them; copies of layers have stubs of their own."""
    layer = ff.nn.QuantizedLinear(2, 2)
    other = copier(layer)
    x = torch.ones(1, 2)
    with layer.output_quantizer.register_override(lambda q, inner, args, kwargs: args[0] * 0):
        assert not layer(x).any()
        assert other(x).any()
    assert layer(x).any()
    with other.output_quantizer.register_override(lambda q, inner, args, kwargs: args[0] * 0):
        assert not other(x).any()
        assert layer(x).any()


def test_a_lone_copy_leaves_its_owner_behind():
    layer = ff.nn.QuantizedLinear(2, 2)
    assert copy.deepcopy(layer.output_quantizer)._owner_changed is None


class Log:
    def __init__(self):
        self.calls = []

    def record(self, quantizer, tensor_in, tensor_out):
        self.calls.append((quantizer, tensor_in, tensor_out))


def test_recording_sees_every_floating_call():
    stub, quantizer, x = QuantizerStub(), calibrated(), torch.tensor([0.3])
    with recording(Log()) as log:
        stub(x)
        quantizer(x)
        stub(torch.tensor([1]))
        stub(None)
    stub(x)
    assert [call[0] for call in log.calls] == [stub, quantizer]
    assert log.calls[0][1] is log.calls[0][2] is x
    assert torch.equal(log.calls[1][2], quantizer(x))


# ------------------------------------------------------------------------------------------------------ LinearQuantizer
def test_uncalibrated_use_names_the_site():
    quantizer = LinearQuantizer(8, metadata=QuantizerMetadata(("activation/input",), "linear", "input", "m.py", 7))
    assert not quantizer.is_calibrated
    for use in (quantizer, quantizer.quantize, lambda x: quantizer.quantization_range):
        with pytest.raises(CalibrationError, match=r"linear\(input\) at m.py:7"):
            use(torch.ones(1))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_bits": 0}, ValueError),
        ({"num_bits": 17}, ValueError),
        ({"num_bits": "8"}, TypeError),
        ({"num_bits": 8, "granularity": 0}, TypeError),
        ({"num_bits": 8, "quantized_dtype": torch.int4}, ValueError),
        ({"num_bits": 8, "quantized_dtype": torch.float16}, TypeError),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        LinearQuantizer(**arguments)


@pytest.mark.parametrize("bounds", [(torch.nan, 1.0), (-torch.inf, 1.0), (2.0, 1.0)])
def test_bad_ranges_change_nothing(bounds):
    quantizer = calibrated()
    before = quantizer.scale.clone()
    with pytest.raises(CalibrationError):
        quantizer.quantization_range = bounds
    assert torch.equal(quantizer.scale, before)


@pytest.mark.parametrize(
    ("dtype", "bounds", "stored"),
    [
        (None, (-8, 7), torch.int8),
        (torch.uint4, (0, 15), torch.uint8),
        (torch.int4, (-8, 7), torch.int8),
        (torch.uint8, (0, 15), torch.uint8),
        (torch.int32, (-8, 7), torch.int32),
    ],
)
def test_the_stored_type_decides_the_grid(dtype, bounds, stored):
    quantizer = LinearQuantizer(4, quantized_dtype=dtype, symmetric=False)
    assert (quantizer.quant_min, quantizer.quant_max) == bounds
    quantizer.quantization_range = (-1.0, 1.0)
    x = torch.linspace(-1, 1, 9)
    assert quantizer.quantize(x).int_repr().dtype == stored
    assert torch.equal(quantizer.quantize(x).dequantize(), quantizer(x))


def test_restricted_range_is_symmetric():
    quantizer = LinearQuantizer(8, restricted=True)
    quantizer.quantization_range = (-1.27, 1.0)
    assert (quantizer.quant_min, quantizer.quant_max) == (-127, 127)
    assert quantizer.scale.item() == pytest.approx(0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerGroup(4), PerToken()], ids=str)
def test_range_round_trip_and_stored_values(bits, granularity):
    x = randn(3, 8)
    quantizer = LinearQuantizer(bits, symmetric=False, granularity=granularity)
    with ff.estimate_ranges(quantizer, ff.observers.MinMax):
        assert torch.equal(quantizer(x), x)
    low, high = quantizer.quantization_range
    scale = quantizer.scale.clone()
    quantizer.quantization_range = (low, high)
    torch.testing.assert_close(quantizer.scale, scale)
    assert torch.equal(quantizer.quantize(x).dequantize(), quantizer(x))


@pytest.mark.parametrize("cast", [lambda q: q.half(), lambda q: q.to(torch.bfloat16), lambda q: q.double()])
def test_scales_stay_float32(cast):
    quantizer = cast(calibrated(symmetric=False))
    assert (quantizer.scale.dtype, quantizer.zero_point.dtype) == (torch.float32, torch.int32)
    assert cast(calibrated().learn_range()).scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_keep_the_data_type(dtype):
    out = calibrated()(torch.tensor([0.3, 5.0], dtype=dtype))
    assert out.dtype == dtype
    assert torch.equal(out, calibrated()(torch.tensor([0.3, 5.0], dtype=dtype).float()).to(dtype))


def test_state_dict_brings_the_shape():
    source = LinearQuantizer(4, granularity=PerChannel(0), symmetric=False)
    source.quantization_range = (torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 3.0]))
    target = LinearQuantizer(4, granularity=PerChannel(0), symmetric=False)
    target.load_state_dict(source.state_dict())
    x = randn(2, 8)
    assert torch.equal(target(x), source(x))
    learned = LinearQuantizer(4, granularity=PerChannel(0), symmetric=False)
    learned.load_state_dict(copy.deepcopy(source).learn_range().state_dict())
    assert torch.equal(learned(x), source(x))


def test_setting_a_range_again_keeps_the_buffer():
    quantizer = calibrated()
    scale = quantizer.scale
    quantizer.quantization_range = (-2.0, 2.0)
    assert quantizer.scale is scale
    assert scale.item() == pytest.approx(2 / 127)
    quantizer.reset_parameters()
    assert not quantizer.is_calibrated


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_are_independent(copier):
    quantizer, x = calibrated(), torch.tensor([0.3])
    other = copier(quantizer)
    quantizer.quantization_range = (-100.0, 100.0)
    assert torch.equal(other(x), calibrated()(x))


def test_observe_widens_the_range():
    quantizer = LinearQuantizer(8, symmetric=False)
    quantizer.observe(torch.tensor([0.0, 1.0]))
    quantizer.observe(torch.tensor([-1.0, 0.5]))
    low, high = quantizer.quantization_range
    assert low.item() == pytest.approx(-1, abs=0.01)
    assert high.item() == pytest.approx(1, abs=0.01)
    with pytest.raises(CalibrationError, match="int64"):
        quantizer.observe(torch.tensor([1]))
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}


def test_factory_keeps_the_metadata():
    stub = QuantizerStub("parameter/weight")
    made = LinearQuantizer.factory(4, symmetric=False)("layer.weight_quantizer", stub)
    assert made.quant_metadata is stub.quant_metadata
    assert made.num_bits == 4


@pytest.mark.parametrize(
    "quantizer",
    [
        LinearQuantizer(4, symmetric=False),
        LinearQuantizer(4, granularity=PerChannel(0)),
        LinearQuantizer(4, granularity=PerGroup(8)),
        Float8Quantizer(),
        DynamicLinearQuantizer(8, granularity=PerToken()),
        DynamicFloat8Quantizer(),
        BlockFormatQuantizer("nvfp4"),
    ],
    ids=repr,
)
def test_under_compile_nothing_changes(quantizer):
    x = randn(4, 16)
    if hasattr(quantizer, "observe"):
        quantizer.observe(x)
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    leaf, other = (2 * x).requires_grad_(), (2 * x).requires_grad_()
    got, want = compiled(leaf), quantizer(other)
    assert torch.equal(got, want)
    for out in (got, want):
        (out * x).sum().backward()
    assert torch.equal(leaf.grad, other.grad)


# ------------------------------------------------------------------------------------------------------------ learning
def test_learned_scales_follow_lsq():
    """Gradient of the scale: round(v) - v inside the grid, the bound outside; times 1 / sqrt(n * quant_max)."""
    quantizer = LinearQuantizer(4)
    quantizer.set_parameters(torch.tensor(0.5))
    quantizer.learn_range()
    x = torch.tensor([0.6, -0.2, 10.0, -10.0], requires_grad=True)
    quantizer(x).sum().backward()
    inside = (1 - 1.2) + (0 + 0.4)
    assert quantizer.scale.grad.item() == pytest.approx((inside + 7 - 8) / (4 * 7) ** 0.5, rel=1e-5)
    assert x.grad.tolist() == [1, 1, 0, 0]
    assert "zero_point" not in dict(quantizer.named_parameters())


def test_learning_reduces_the_error_and_freezes():
    x = randn(512)
    quantizer = LinearQuantizer(3, symmetric=False)
    quantizer.quantization_range = (-6.0, 9.0)
    before = (quantizer(x) - x).square().mean()
    quantizer.learn_range(scale_gradient=False)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    assert {name for name, _ in quantizer.named_parameters()} == {"scale", "zero_point"}
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    after = (quantizer(x) - x).square().mean()
    assert after < before / 2
    values = quantizer(x).detach()
    quantizer.freeze_range()
    assert not list(quantizer.parameters())
    assert quantizer.zero_point.dtype == torch.int32
    assert torch.equal(quantizer(x), values)
    assert torch.equal(quantizer.quantize(x).dequantize(), values)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_learned_scale_that_left_the_positive_numbers(scale):
    quantizer = calibrated(4).learn_range()
    with torch.no_grad():
        quantizer.scale.fill_(scale)
    x = torch.tensor([0.3, -0.2])
    out = quantizer(x)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert quantizer.scale.grad is not None
    quantizer.freeze_range()
    assert quantizer.scale > 0


def test_learning_needs_a_start():
    with pytest.raises(CalibrationError):
        LinearQuantizer(4).learn_range()


# ------------------------------------------------------------------------------------------------- the other quantizers
@pytest.mark.parametrize("granularity", [PerTensor(), PerToken(), PerGroup(4)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_is_static_with_the_tensors_own_range(granularity, symmetric):
    x = randn(3, 8)
    dynamic = DynamicLinearQuantizer(8, symmetric=symmetric, granularity=granularity)
    static = LinearQuantizer(8, symmetric=symmetric, granularity=granularity)
    with ff.estimate_ranges(static):
        static(x)
    assert torch.equal(dynamic(x), static(x))
    assert torch.equal(dynamic.quantize(x).dequantize(), static(x))
    assert dynamic.is_calibrated
    leaf = x.clone().requires_grad_()
    dynamic(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))
    assert dynamic(torch.empty(0, 8)).shape == (0, 8)


def test_dynamic_with_its_own_inference():
    quantizer = DynamicLinearQuantizer(4, parameter_inference_fn=lambda q, x: (torch.tensor(0.5), None))
    assert quantizer(torch.tensor([0.6, 9.0])).tolist() == [0.5, 3.5]


def test_float8_quantizers():
    x = randn(4, 16) * 3
    static, dynamic = Float8Quantizer(), DynamicFloat8Quantizer()
    with pytest.raises(CalibrationError):
        static(x)
    with ff.estimate_ranges(static):
        static(x)
    assert torch.equal(static(x), dynamic(x))
    assert torch.equal(static.quantize(x).dequantize(), static(x))
    assert static.quantize(x).int_repr().dtype == torch.float8_e4m3fn
    assert static.scale.item() == pytest.approx(x.abs().max().item() / 448)
    assert static.half().scale.dtype == torch.float32
    fresh = Float8Quantizer()
    fresh.load_state_dict(static.state_dict())
    assert torch.equal(fresh(x), static(x))


def test_block_format_quantizer():
    quantizer = BlockFormatQuantizer("mxfp4")
    assert quantizer.num_bits == 4
    assert quantizer.is_calibrated
    assert quantizer(torch.tensor([6.0, 0.9, 0.2])).tolist() == [6.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="known are"):
        BlockFormatQuantizer("fp5")
    with pytest.raises(QuantizationError, match="stored"):
        quantizer.quantize(torch.ones(2))


@pytest.mark.parametrize(
    "quantizer", [calibrated(), calibrated().learn_range(), Float8Quantizer(), QuantizerStub("activation")]
)
def test_reprs_are_short(quantizer):
    assert isinstance(quantizer, Quantizer)
    assert len(repr(quantizer)) < 150


# ----------------------------------------------------------------------------------------------------------- switching
def test_disable_and_enable():
    model = torch.nn.Sequential(calibrated(2), calibrated(2))
    x = torch.tensor([0.3, -0.9])
    quantized = model(x)
    with ff.disable_quantization(model) as override:
        assert torch.equal(model(x), x)
        with ff.enable_quantization(model[0]):
            assert torch.equal(model(x), model[0](x))
        assert torch.equal(model(x), x)
        override.enable_quantization()
        assert torch.equal(model(x), quantized)
    assert torch.equal(model(x), quantized)
    assert not model[0].overrides
    with pytest.raises(RuntimeError), ff.disable_quantization([model[0]]):
        assert torch.equal(model(x), model[1](x))
        raise RuntimeError
    assert not model[0].overrides


def test_tiny_ranges_are_stored_as_simulated():
    quantizer = LinearQuantizer(8)
    quantizer.quantization_range = (-1e-20, 1e-20)
    x = torch.tensor([-1e-20, 3e-21])
    assert torch.equal(quantizer.quantize(x).dequantize(), quantizer(x))
    assert quantizer(x).any()

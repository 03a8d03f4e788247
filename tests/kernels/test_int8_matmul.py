"""Static int8 linear, batched product and convolution on CPUs against the exact reference."""

import itertools

import fastforward_kernels as ffk
import pytest
import torch
from fastforward_kernels import cpu_int4, cpu_matmul, cpu_weight_only, epilogue, ops_matmul
from fastforward_kernels import reference_matmul as reference

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)


def integers(shape, dtype=torch.int8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = epilogue.INTEGER_RANGES[dtype]
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def floats(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int32(value):
    return torch.tensor(value, dtype=torch.int32)


def output(dtype, scale=0.05):
    if dtype in epilogue.INTEGER_RANGES:
        return {"out_dtype": dtype, "out_scale": torch.tensor(scale), "out_zero_point": int32(3)}
    return {"out_dtype": dtype}


def positional(arguments):
    return [arguments.get(key) for key in ("out_dtype", "out_scale", "out_zero_point")]


def assert_same(y, expected, activation):
    assert y.dtype == expected.dtype and y.shape == expected.shape
    if activation in ("none", "relu"):
        assert torch.equal(y, expected)
    elif y.dtype == torch.float32:
        assert torch.allclose(y, expected, rtol=1e-6, atol=1e-6)
    elif y.is_floating_point():
        assert torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=1e-6)
    else:
        assert (y.int() - expected.int()).abs().max() <= 1


def linear_case(m, k, n, x_dtype, per_token, weight_zero_point):
    low, high = epilogue.INTEGER_RANGES.get(x_dtype, (-128, 127))
    count = (m,) if per_token else ()
    generator = torch.Generator().manual_seed(2)
    x_scale = torch.rand(count, generator=generator) * 0.01 + 0.01
    x_zero_point = torch.randint(low, high, count, generator=generator, dtype=torch.int32)
    x = floats((m, k)) if x_dtype.is_floating_point else integers((m, k), x_dtype)
    zero_point = integers((n,), seed=3).int() if weight_zero_point else None
    weight_scale = torch.rand(n, generator=generator) * 0.01 + 1e-4
    return x, x_scale, x_zero_point, ffk.pack_linear_weight(integers((n, k), seed=1), weight_scale, zero_point)


@pytest.mark.parametrize("size", [(1, 33, 7), (40, 300, 200), (300, 64, 129)], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.int8, torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(epilogue.ACTIVATIONS))
def test_linear(size, x_dtype, activation):
    m, _, n = size
    bias, residual = floats((n,), 4), floats((m, n), 5)
    for per_token, weight_zero_point, out_dtype, extra in itertools.product((0, 1), (0, 1), OUTPUTS, (None, residual)):
        x, x_scale, x_zero_point, packed = linear_case(*size, x_dtype, per_token, weight_zero_point)
        out = output(out_dtype)
        y = ffk.int8_linear(x, x_scale, x_zero_point, packed, bias=bias, residual=extra, activation=activation, **out)
        rest = (*packed, bias, extra, activation, *positional(out))
        if x.is_floating_point():
            expected = reference.int8_linear_quantizing(x, x_scale, x_zero_point, -128, 127, *rest)
        else:
            expected = reference.int8_linear(x, x_scale, x_zero_point, *rest)
        assert_same(y, expected, activation)


def test_linear_is_close_to_the_float_product():
    x, weight = floats((50, 256)), floats((64, 256), 1)
    x_scale, x_zero_point = torch.tensor(8 / 255), int32(0)
    weight_scale = weight.abs().amax(1) / 127
    q = ffk.quantize(weight, weight_scale, torch.zeros(64, dtype=torch.int32), -128, 127, torch.int8, axis=0)
    y = ffk.int8_linear(x, x_scale, x_zero_point, ffk.pack_linear_weight(q, weight_scale))
    noise = (y - x @ weight.t()).square().mean() / y.square().mean()
    assert noise < 1e-3


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("size", [(3, 64, 40), (300, 64, 200)], ids=str)  # an epilogue of its own, and oneDNN's
def test_activations_are_as_exact_as_torch(activation, size):
    m, k, n = size
    packed = ffk.pack_linear_weight(integers((n, k), seed=1), torch.full((n,), 0.001))
    arguments = (integers((m, k), torch.uint8), torch.tensor(0.1), int32(7), packed)
    y = ffk.int8_linear(*arguments, activation=activation)
    before = ffk.int8_linear(*arguments)
    none, same = (
        reference.int8_linear(*arguments[:3], *packed, None, None, name, *positional(output(torch.float32)))
        for name in ("none", activation)
    )
    assert torch.equal(before, none)
    assert ((y - same).abs() <= 1e-6).all()
    if activation == "gelu":  # torch's own, in float32, is 1.2e-6 away from float64
        exact = torch.nn.functional.gelu(before).double()
    else:
        exact = epilogue.ACTIVATIONS[activation](before.double())
    assert ((y - exact).abs() <= 1e-6 * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize("zero_point", [0, 1, 7, -128])
@pytest.mark.parametrize("out_dtype", [torch.int8, torch.uint8])
def test_requantizing_is_quantizing_the_result(zero_point, out_dtype):
    # halves are ties: with an odd zero point it matters whether that is added before or after rounding
    grid = (torch.tensor(1.0), int32(zero_point % 256 if out_dtype == torch.uint8 else zero_point))
    limits = (*epilogue.INTEGER_RANGES[out_dtype], out_dtype)
    out = {"out_dtype": out_dtype, "out_scale": grid[0], "out_zero_point": grid[1]}
    half = torch.tensor(0.5)
    for m, n in ((4, 16), (400, 100)):
        packed = ffk.pack_linear_weight(integers((n, 8), seed=1) % 7 - 3, torch.ones(n))
        arguments = (integers((m, 8), torch.uint8) % 17 + 120, half, int32(128), packed)
        y = ffk.int8_linear(*arguments)
        assert (y % 1 == 0.5).any()
        assert torch.equal(ffk.int8_linear(*arguments, **out), ffk.quantize(y, *grid, *limits))
    packed = ffk.pack_conv_weight(integers((32, 4, 3, 3), seed=1) % 3 - 1, torch.ones(32))
    arguments = (integers((2, 4, 9, 9), torch.uint8) % 17 + 120, half, int32(128), packed)
    y = ffk.int8_conv(*arguments, padding=1, activation="relu")
    q = ffk.int8_conv(*arguments, padding=1, activation="relu", **out)
    assert torch.equal(q, ffk.quantize(y, *grid, *limits)) and q.stride() == y.stride()


def test_unsigned_weights_are_the_same_numbers():
    x, scale = integers((5, 32)), torch.rand(8)
    weight = integers((8, 32), torch.uint8)
    packed = ffk.pack_linear_weight(weight, scale, torch.full((8,), 131, dtype=torch.int32))
    y = ffk.int8_linear(x, torch.tensor(1.0), int32(7), packed)
    assert torch.equal(y, ((x.double() - 7) @ (weight.double() - 131).t()).float() * scale)
    assert packed.weight.dtype == torch.int8
    assert ffk.pack_linear_weight(weight, scale, torch.full((8,), 128, dtype=torch.int32)).zero_point is None


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 2, 16), (16,)])
def test_leading_axes_and_empty_batches(shape):
    packed = ffk.pack_linear_weight(integers((4, 16)), torch.ones(4))
    x = integers(shape)
    y = ffk.int8_linear(x, torch.tensor(0.5), int32(1), packed, bias=torch.ones(4))
    assert torch.equal(y, ((x.double() - 1) @ packed.weight.double().t()).float() * 0.5 + 1)


def test_layouts_of_the_activation():
    packed = ffk.pack_linear_weight(integers((40, 64)), torch.ones(40))
    for x in (integers((64, 900)).t(), integers((900, 128))[:, ::2], integers((1, 64)).expand(900, 64)):
        y = ffk.int8_linear(x, torch.tensor(1.0), None, packed)
        assert torch.equal(y, (x.double() @ packed.weight.double().t()).float())


def test_a_changed_weight_is_packed_again():
    weight = integers((64, 64))
    packed = ffk.PackedWeight(weight, torch.ones(64), None, weight.sum(1, dtype=torch.int32))
    x = integers((1000, 64), torch.uint8)
    first = ffk.int8_linear(x, torch.tensor(1.0), None, packed)
    weight.neg_().clamp_(-127, 127)
    assert torch.equal(ffk.int8_linear(x, torch.tensor(1.0), None, packed), (x.double() @ weight.double().t()).float())
    assert not torch.equal(first, ffk.int8_linear(x, torch.tensor(1.0), None, packed))


def test_packs_die_with_their_weight():
    def use():
        packed = ffk.pack_linear_weight(integers((64, 64)), torch.ones(64))
        ffk.int8_linear(integers((1000, 64), torch.uint8), torch.tensor(1.0), None, packed)
        return len(cpu_matmul.PACKS._entries)

    before = len(cpu_matmul.PACKS._entries)
    used = use()
    assert len(cpu_matmul.PACKS._entries) == before
    assert not cpu_matmul.exact_onednn() or used > before


@pytest.mark.parametrize("types", list(itertools.product((torch.int8, torch.uint8), repeat=2)), ids=str)
def test_batched_product(types):
    a, b = integers((2, 3, 5, 64), types[0]), integers((2, 3, 64, 33), types[1], 1)
    scale = torch.tensor(0.1) * torch.tensor(0.02)
    for za, zb in itertools.product((None, int32(5)), (None, int32(-7))):
        y = ffk.int8_matmul(a, torch.tensor(0.1), za, b, torch.tensor(0.02), zb)
        acc = (a.double() - (0 if za is None else 5)) @ (b.double() - (0 if zb is None else -7))
        assert torch.equal(y, acc.float() * scale)
    transposed = b.transpose(-1, -2).contiguous().transpose(-1, -2)
    y = ffk.int8_matmul(a, torch.tensor(0.1), None, transposed, torch.tensor(0.02), None)
    assert torch.equal(y, (a.double() @ b.double()).float() * scale)


CONVOLUTIONS = [  # channels, outputs, kernel, stride, padding, dilation, groups
    (16, 32, 3, 1, 1, 1, 1),
    (16, 32, 3, 2, 1, 1, 1),
    (16, 16, 3, 1, 1, 1, 16),
    (16, 32, 3, 1, 2, 2, 4),
    (16, 32, 1, 1, 0, 1, 1),
    (3, 8, 5, 3, 2, 1, 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("x_dtype", [torch.int8, torch.uint8])
def test_convolution(case, dims, x_dtype):
    channels, outputs, kernel, stride, padding, dilation, groups = case
    x = integers((2, channels, *(13, 15)[:dims]), x_dtype)
    weight, scale = integers((outputs, channels // groups, *(kernel,) * dims), seed=1), torch.rand(outputs) * 0.01
    zero_point, x_scale, bias = (
        int32(epilogue.INTEGER_RANGES[x_dtype][0] + 30),
        torch.tensor(0.0137),
        floats((outputs,)),
    )
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    lists = [[value] * dims for value in (stride, padding, dilation)]
    weight_zero_points = (None, integers((outputs,), seed=6).int())
    for weight_zero_point, activation, out_dtype in itertools.product(
        weight_zero_points, ("none", "relu", "gelu"), (torch.float32, torch.bfloat16, torch.int8)
    ):
        packed, out = ffk.pack_conv_weight(weight, scale, weight_zero_point), output(out_dtype, 0.5)
        for with_residual in (False, True):
            plain = reference.int8_conv(
                x, x_scale, zero_point, *packed, bias, None, *lists, groups, activation, torch.float32, None, None
            )
            residual = floats(plain.shape) if with_residual else None
            y = ffk.int8_conv(
                x, x_scale, zero_point, packed, residual=residual, activation=activation, **options, **out
            )
            expected = reference.int8_conv(
                x, x_scale, zero_point, *packed, bias, residual, *lists, groups, activation, *positional(out)
            )
            assert_same(y, expected, activation)
            assert y.stride() == expected.stride()


def test_convolution_pads_with_real_zeros():
    x = torch.full((1, 1, 3, 3), 20, dtype=torch.uint8)
    packed = ffk.pack_conv_weight(torch.ones(1, 1, 3, 3, dtype=torch.int8), torch.ones(1))
    y = ffk.int8_conv(x, torch.tensor(1.0), int32(10), packed, padding=1)
    assert y[0, 0].tolist() == [[40.0, 60.0, 40.0], [60.0, 90.0, 60.0], [40.0, 60.0, 40.0]]


@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_linear_against_float64(float8):
    x, weight = floats((3, 5, 64)).to(float8), floats((33, 64), 1).to(float8)
    bias = floats((33,), 2)
    for x_scale, weight_scale in ((torch.tensor(0.3), torch.tensor(2.0)), (torch.rand(15) + 0.5, torch.rand(33) + 0.5)):
        y = ffk.float8_linear(x, x_scale, weight, weight_scale, bias)
        rows = x.double().reshape(15, 64) @ weight.double().t()
        expected = rows * x_scale.reshape(-1, 1).double() * weight_scale.double() + bias
        assert torch.allclose(y.double().reshape(15, 33), expected, rtol=1e-5, atol=1e-5)
        assert ffk.float8_linear(x, x_scale, weight, weight_scale, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_float8_linear_equals_the_reference_for_every_byte(float8):
    every = torch.arange(256, dtype=torch.uint8).view(float8)[:, None]
    one, scale = torch.ones(1, 1).to(float8), torch.tensor(0.3)
    y = ffk.float8_linear(every, scale, one, scale, torch.ones(1))
    expected = reference.float8_linear(every, scale, one, scale, torch.ones(1), torch.float32)
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().any()
    assert torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_dequantized_as_the_reference_does(bits, dtype):
    q = integers((700, 512)) >> (8 - bits)
    for zero_point in (None, integers((700, 4), seed=1).int() % 5):
        packed = ffk.pack_weight_only(q, torch.rand(700, 4), zero_point, bits=bits, group_size=128)
        assert torch.equal(cpu_weight_only.dequantized(*packed, dtype), reference.dequantized(*packed, dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_linear_is_the_product_with_the_dequantized_weight(bits, group_size, dtype):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = integers((48, 256)).clamp(low, high)
    scale, x = torch.rand(48, 256 // group_size), floats((7, 256)).to(dtype)
    for zero_point in (None, torch.randint(low, high, scale.shape, dtype=torch.int32)):
        packed = ffk.pack_weight_only(q, scale, zero_point, bits=bits, group_size=group_size)
        weight = ffk.dequantize(q, scale, zero_point, group_size=group_size, out_dtype=dtype)
        y = ffk.weight_only_linear(x, packed, bias=torch.ones(48, dtype=dtype))
        expected = torch.nn.functional.linear(x.double(), weight.double(), torch.ones(48).double())
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert torch.allclose(y.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert packed.weight.numel() == 48 * 256 * bits // 8


def test_weight_only_linear_passes_gradients_to_activation_and_bias():
    q, scale = integers((16, 64)).clamp(-8, 7), torch.rand(16, 2)
    packed = ffk.pack_weight_only(q, scale, bits=4, group_size=32)
    weight = ffk.dequantize(q, scale, None, group_size=32)
    x, bias = floats((2, 5, 64)).requires_grad_(), floats((16,)).requires_grad_()
    grad = floats((2, 5, 16), 3)
    ffk.weight_only_linear(x, packed, bias).backward(grad)
    assert torch.allclose(x.grad, grad @ weight, atol=1e-5)
    assert torch.allclose(bias.grad, grad.sum((0, 1)), atol=1e-5)


@pytest.mark.skipif(not cpu_int4.reads_packed(), reason="ATen packs int4 weights in another order here")
@pytest.mark.parametrize("group", [32, 256])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (192, 512), (64 * 5, 4096)])
def test_unpacked_int4_equals_the_kernel_of_aten(n: int, k: int, group: int) -> None:
    packed = torch._convert_weight_to_int4pack_for_cpu(integers((n, k)).int() & 15, 1)
    scales = torch.stack((torch.rand(k // group, n) + 0.1, floats((k // group, n)) * 3), -1).bfloat16()
    rows = (floats((70, k)) + 2).bfloat16()  # a mean, which what is added to a group is multiplied by
    expected = reference.int4_linear(rows, packed, group, scales)
    by_aten = torch._weight_int4pack_mm_for_cpu(rows, packed, group, scales).float()
    actual = ops_matmul.INT4_LINEAR(rows, packed, group, scales)
    deviation = [(y - expected).abs().mean() / expected.abs().mean() for y in (by_aten, actual)]
    assert deviation[0] < 4e-3
    assert deviation[1] < 4e-3
    rows[1, 5] = float("nan")
    with_nan = ops_matmul.INT4_LINEAR(rows, packed, group, scales)
    assert with_nan[1].isnan().all()
    assert torch.equal(with_nan[2:], actual[2:])


PACKED = ffk.pack_linear_weight(torch.ones(4, 8, dtype=torch.int8), torch.ones(4))
ONE = torch.tensor(1.0)
ERRORS = [
    (lambda x: ffk.int8_linear(x, ONE, None, PACKED, activation="tanh"), ValueError, "'tanh' cannot be fused"),
    (lambda x: ffk.int8_linear(x, ONE, None, PACKED, out_dtype=torch.int8), ValueError, "needs out_scale"),
    (lambda x: ffk.int8_linear(x, ONE, None, PACKED, out_scale=ONE), ValueError, "takes none"),
    (lambda x: ffk.int8_linear(x, ONE, None, PACKED, out_dtype=torch.int32), TypeError, "out_dtype must be"),
    (lambda x: ffk.int8_linear(x.int(), ONE, None, PACKED), TypeError, "xq must be int8 or uint8"),
    (lambda x: ffk.pack_linear_weight(x.float(), ONE), TypeError, "int8 or uint8, got torch.float32"),
    (lambda x: ffk.pack_linear_weight(x, torch.ones(3)), ValueError, "3 elements for a weight with 2"),
    (lambda x: ffk.pack_linear_weight(torch.empty(1, 70_000, dtype=torch.int8), ONE), ValueError, "overflow int32"),
    (lambda x: ffk.pack_weight_only(x, ONE, bits=3, group_size=8), ValueError, "4 or 8 bits"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 8, dtype=torch.int8))


def test_the_deepest_allowed_sum_does_not_overflow():
    x = torch.full((1, epilogue.MAX_K), 255, dtype=torch.uint8)
    packed = ffk.pack_linear_weight(torch.full((40_000 // 8, epilogue.MAX_K), -128, dtype=torch.int8)[:2], ONE)
    assert ffk.int8_linear(x, ONE, None, packed)[0, 0] == float(-255 * 128 * epilogue.MAX_K)

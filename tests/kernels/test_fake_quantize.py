"""Fake quantization on CPUs: bit-equal to ATen, gradients, layouts, awkward shapes."""

import threading

import fastforward_kernels as ffk
import pytest
import torch
from fastforward_kernels import cpu_fake_quantize, cpu_gradients, cpu_sweep, reference

from tests.kernels.exact import assert_lsq_sums

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(), (1,), (5,), (64, 48), (3, 7, 5), (2, 3, 40, 30), (0, 4), (700, 300)]
GRIDS = [(-128, 127), (0, 255), (-8, 7), (-1, 0), (0, 1), (-32768, 32767)]


def data(shape, dtype=torch.float32, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def parameters(count, grid=(-128, 127), seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, generator=generator) * 6 / (grid[1] - grid[0]) + 1e-3
    return scale, torch.randint(grid[0], grid[1] + 1, (count,), generator=generator, dtype=torch.int32)


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grid", GRIDS)
def test_per_tensor_equals_aten(dtype, grid):
    for shape in SHAPES:
        x = data(shape, dtype)
        scale, zero_point = (p[0] for p in parameters(1, grid))
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *grid)
        assert torch.equal(ffk.fake_quantize(x, scale, zero_point, *grid), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 48), (3, 7, 5), (2, 3, 40, 30), (700, 300)])
def test_per_channel_equals_aten_forward_and_gradient(shape, dtype):
    for axis in range(-1, len(shape)):
        scale, zero_point = parameters(shape[axis])
        ours, theirs = data(shape, dtype).requires_grad_(), data(shape, dtype).requires_grad_()
        y = ffk.fake_quantize(ours, scale, zero_point, -128, 127, axis=axis)
        expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero_point, axis % len(shape), -128, 127)
        assert torch.equal(y, expected)
        grad = data(shape, dtype, seed=5)
        y.backward(grad)
        expected.backward(grad)
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grid", GRIDS)
def test_per_tensor_gradient_equals_aten_with_ties_on_the_bounds(dtype, grid):
    # a power of two as scale puts values exactly on the ties beside both bounds
    steps = torch.tensor([grid[0] - 1.5, grid[0] - 0.5, grid[0], 0, grid[1], grid[1] + 0.5, grid[1] + 1.5, 0.5, -0.5])
    for zero in (0, grid[0], grid[1]):
        zero_point = scalar(zero, torch.int32)
        ours = ((steps - zero) * 0.25).to(dtype).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        grad = torch.arange(1, 10).to(dtype)
        ffk.fake_quantize(ours, scalar(0.25), zero_point, *grid).backward(grad)
        torch.fake_quantize_per_tensor_affine(theirs, scalar(0.25), zero_point, *grid).backward(grad)
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("tile", [[1, 32], [4, 16], [-1, 16], [64, 96], [2, 1], [1, 1], [64, -1], []])
@pytest.mark.parametrize("dtype", FLOATS)
def test_tiles_equal_the_reference(tile, dtype):
    x = data((64, 96), dtype)
    blocks = reference.tiling.layout((64, 96), tuple(tile)).blocks
    scale, zero_point = parameters(blocks, (-8, 7))
    y = ffk.fake_quantize_tiles(x, scale, zero_point, -8, 7, tile)
    assert torch.equal(y, reference.fake_quantize(x, scale, zero_point, -8, 7, tile))


@pytest.mark.parametrize("tile", [[1, 2], [4, 16], [-1, 16], [2, 1], [8, 96], [64, -1]])
@pytest.mark.parametrize("symmetric", [False, True])
def test_parameters_derived_in_several_batches_are_those_of_the_reference(tile, symmetric, monkeypatch):
    monkeypatch.setattr(cpu_sweep, "CHUNK", 4)
    x, grad = data((64, 96)), data((64, 96), seed=3)
    scale, zero_point = parameters(reference.tiling.layout((64, 96), tuple(tile)).blocks, (-8, 7))
    grid = scale, torch.zeros_like(zero_point) if symmetric else zero_point, -8, 7, tile
    expected, to_x = reference.fake_quantize(x, *grid), reference.fake_quantize_backward(grad, x, *grid)
    y, clipped = cpu_fake_quantize.fake_quantize_with_clipped(x, *grid)
    assert torch.equal(cpu_fake_quantize.fake_quantize(x, *grid), expected)
    assert torch.equal(y, expected)
    assert torch.equal(cpu_fake_quantize.zero_clipped(grad, clipped), to_x)
    assert torch.equal(cpu_gradients.fake_quantize_backward(grad, x, *grid), to_x)
    from_lsq, *sums = cpu_gradients.fake_quantize_lsq_backward(grad, x, *grid)
    assert torch.equal(from_lsq, to_x)
    assert_lsq_sums(sums, grad, x, *grid)


def test_many_blocks_do_not_grow_the_buffers(monkeypatch):
    monkeypatch.setattr(cpu_sweep, "SCRATCH", threading.local())
    x = torch.ones(1024, 1024)
    scale, zero_point = parameters(x.numel(), (-8, 7))
    cpu_fake_quantize.fake_quantize(x, scale, zero_point, -8, 7, [1, 1])
    cpu_gradients.fake_quantize_lsq_backward(x, x, scale, zero_point, -8, 7, [1, 1])
    assert {buffer.numel() for buffer in cpu_sweep.SCRATCH.__dict__.values()} == {cpu_sweep.SINGLE}


def test_groups_lie_along_the_last_axis_or_the_given_one():
    x = data((6, 8))
    scale, zero_point = parameters(12)
    by_hand = torch.cat(
        [
            reference.fake_quantize(part, s, z, -128, 127, [])
            for part, s, z in zip(x.reshape(12, 4), scale, zero_point, strict=True)
        ]
    )
    assert torch.equal(ffk.fake_quantize(x, scale, zero_point, -128, 127, group_size=4).flatten(), by_hand)
    along_first = ffk.fake_quantize(x, scale[:3], zero_point[:3], -128, 127, axis=0, group_size=2)
    assert torch.equal(along_first, reference.fake_quantize(x, scale[:3], zero_point[:3], -128, 127, [2, -1]))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "offset": lambda x: x[1:, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_memory_layouts(layout, dtype):
    x = LAYOUTS[layout](data((2, 4, 300, 70), dtype))
    grad = data(x.shape, dtype, seed=3)
    for tile in ([], [1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, -1, 1], [1, -1, 2, -1]):
        if tile[2:3] == [2] and x.shape[2] % 2:
            continue
        blocks = reference.tiling.layout(tuple(x.shape), tuple(tile)).blocks
        grid = (*parameters(blocks), -128, 127, tile)
        y = cpu_fake_quantize.fake_quantize(x, *grid)
        assert torch.equal(y, reference.fake_quantize(x, *grid))
        assert y.stride() == torch.empty_like(x).stride()
        expected = reference.fake_quantize_backward(grad, x, *grid)
        assert torch.equal(cpu_gradients.fake_quantize_backward(grad, x, *grid), expected)
        assert torch.equal(cpu_gradients.fake_quantize_lsq_backward(grad, x, *grid)[0], expected)


def test_out_takes_any_buffer_and_the_input_itself():
    x = data((300, 700))
    scale, zero_point = parameters(700)
    expected = ffk.fake_quantize(x, scale, zero_point, -128, 127, axis=1)
    for buffer in (torch.empty(300, 700), torch.empty(700, 300).t(), torch.empty(300, 1400)[:, ::2], x.clone()):
        source = buffer if torch.equal(buffer, x) else x
        assert ffk.fake_quantize_out(source, scale, zero_point, -128, 127, axis=1, out=buffer) is buffer
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tile", [[], [1, -1], [-1, 1], [1, 64], [2, 32]])
def test_learnt_scale_and_zero_point_gradients_against_float64(tile, dtype):
    x, grad = data((256, 640), dtype), data((256, 640), dtype, seed=7)
    blocks = reference.tiling.layout((256, 640), tuple(tile)).blocks
    scale, zero_point = parameters(blocks, (-8, 7))
    to_x, to_scale, to_zero_point = cpu_gradients.fake_quantize_lsq_backward(grad, x, scale, zero_point, -8, 7, tile)
    assert_lsq_sums((to_scale, to_zero_point), grad, x, scale, zero_point, -8, 7, tile)
    assert torch.equal(to_x, reference.fake_quantize_backward(grad, x, scale, zero_point, -8, 7, tile))


def test_gradient_scale_and_learnable_parameters_through_autograd():
    x = data((8, 16)).requires_grad_()
    scale, zero_point = parameters(8, (-8, 7))
    results = []
    for factor in (1.0, 0.25):
        s, z = scale.clone().requires_grad_(), zero_point.float().requires_grad_()
        ffk.fake_quantize(x, s, z, -8, 7, axis=0, gradient_scale=factor).square().sum().backward()
        results.append((s.grad, z.grad))
    assert torch.allclose(results[0][0] * 0.25, results[1][0])
    assert torch.allclose(results[0][1] * 0.25, results[1][1])
    assert results[0][0].abs().sum() > 0 and results[0][1].abs().sum() > 0


def test_learnt_gradients_agree_with_torch_learnable_operator():
    x, grad = data((32, 32)), data((32, 32), seed=2)
    ours, theirs = torch.tensor([0.3], requires_grad=True), torch.tensor([0.3], requires_grad=True)
    ffk.fake_quantize(x, ours, torch.zeros(1, dtype=torch.int32), -8, 7).backward(grad)
    torch._fake_quantize_learnable_per_tensor_affine(x, theirs, torch.zeros(1), -8, 7, 1.0).backward(grad)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_packed_mask_gives_the_same_gradient(count):
    x, grad = data((count,)).requires_grad_(), data((count,), seed=2)
    scale, zero_point = scalar(0.1), scalar(3, torch.int32)
    y, mask = torch.ops.fastforward.fake_quantize_with_mask(x, scale, zero_point, -8, 7, [])
    assert mask.dtype == torch.uint8 and mask.numel() == (count + 7) // 8
    y.backward(grad)
    expected = reference.fake_quantize_backward(grad, x.detach(), scale, zero_point, -8, 7, [])
    assert torch.equal(x.grad, expected)


def test_nan_passes_through_and_infinities_saturate():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
    for dtype in FLOATS:
        y = ffk.fake_quantize(x.to(dtype), scalar(0.5), scalar(0, torch.int32), -8, 7)
        assert y[0].isnan()
        assert y[1:].tolist() == [3.5, -4.0, 3.5, -4.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_equal_torch_quantize(dtype):
    x = data((300, 500), dtype)
    scale, zero_point = scalar(0.037), scalar(11, torch.int32)
    expected = torch.quantize_per_tensor(x.float(), 0.037, 11, torch.quint8).int_repr()
    q = ffk.quantize(x, scale, zero_point, 0, 255, torch.uint8)
    assert torch.equal(q, expected) and q.is_contiguous()
    scales, zero_points = parameters(500)
    expected = torch.quantize_per_channel(x.float(), scales.double(), zero_points.long(), 1, torch.qint8)
    q = ffk.quantize(x, scales, zero_points, -128, 127, torch.int8, axis=1)
    assert torch.equal(q, expected.int_repr())
    assert torch.allclose(ffk.dequantize(q, scales, zero_points, axis=1), expected.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_quantize_then_dequantize_is_fake_quantize(out_dtype):
    x = data((64, 96), out_dtype)
    scale, zero_point = parameters(64 * 3, (-32768, 32767))
    grid = (scale, zero_point)
    q = ffk.quantize(x, *grid, -32768, 32767, torch.int16, group_size=32)
    y = ffk.dequantize(q, *grid, group_size=32, out_dtype=out_dtype)
    assert torch.equal(y, ffk.fake_quantize(x, *grid, -32768, 32767, group_size=32))


def test_integer_quantization_refuses_nan_and_saturates_the_rest():
    grid = (scalar(0.5), scalar(1, torch.int32), -8, 7, torch.int8)
    with pytest.raises(ValueError, match="1 of 3 values are NaN"):
        ffk.quantize(torch.tensor([0.0, float("nan"), 1.0]), *grid)
    x = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38, 3e38, 3e38])  # their sum is not finite either
    assert ffk.quantize(x, *grid).tolist() == [7, -8, 7, -8, 7, 7]


@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("dtype", FLOATS)
def test_float8_grid_equals_the_conversion(float8, dtype):
    x = data((64, 96), dtype, spread=200.0)
    scale, _ = parameters(64)
    largest = torch.finfo(float8).max
    inverse = (1 / scale).unsqueeze(1)
    expected = (x.float() * inverse).clamp(-largest, largest).to(float8)
    assert torch.equal(ffk.quantize_float8(x, scale, float8, axis=0).float(), expected.float())
    y = ffk.fake_quantize_float8(x, scale, float8, axis=0)
    assert torch.equal(y, (expected.float() * scale.unsqueeze(1)).to(dtype))


def test_float8_gradient_is_straight_through_up_to_saturation():
    x = torch.tensor([1.0, 448.0, 500.0, -600.0], requires_grad=True)
    ffk.fake_quantize_float8(x, scalar(1.0), torch.float8_e4m3fn).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


ERRORS = [
    (lambda x: ffk.fake_quantize(x, *parameters(3), -8, 7, axis=0), ValueError, "3 elements, but tile"),
    (lambda x: ffk.fake_quantize(x, *parameters(4), -8, 7, axis=2), IndexError, "axis 2 does not exist"),
    (lambda x: ffk.fake_quantize(x, *parameters(8), -8, 7, group_size=4), ValueError, "does not divide"),
    (lambda x: ffk.fake_quantize(x, *parameters(8), -8, 7, group_size=0), ValueError, "must be positive"),
    (lambda x: ffk.min_max(x[:0]), ValueError, "empty tensor"),
    (lambda x: ffk.histogram(x, 1.0, 1.0), ValueError, "low < high"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(data((4, 6)))


@pytest.mark.parametrize("tile", [[], [1, -1], [-1, 1], [1, 10]])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("single", [0, cpu_fake_quantize.SINGLE], ids=["large", "small"])
def test_the_input_may_be_changed_in_place_afterwards(tile, dtype, single, monkeypatch):
    monkeypatch.setattr(cpu_fake_quantize, "SINGLE", single)
    x, grad = data((60, 40), dtype), data((60, 40), dtype, seed=3)
    blocks = reference.tiling.layout((60, 40), tuple(tile)).blocks
    grid = (*parameters(blocks, (-8, 7)), -8, 7, tile)
    leaf = x.clone().requires_grad_()
    between = leaf * 1.0
    y = ffk.fake_quantize_tiles(between, *grid)
    between.add_(100.0)
    y.backward(grad)
    assert torch.equal(leaf.grad, reference.fake_quantize_backward(grad, x, *grid))


def test_a_learnt_grid_says_that_its_input_was_changed():
    x, scale = data((8,)).requires_grad_() * 1.0, torch.tensor(0.1, requires_grad=True)
    y = ffk.fake_quantize(x, scale, scalar(0, torch.int32), -8, 7)
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("single", [0, cpu_fake_quantize.SINGLE], ids=["large", "small"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipped_elements_get_no_gradient_in_any_layout(layout, single, monkeypatch):
    monkeypatch.setattr(cpu_fake_quantize, "SINGLE", single)
    x = LAYOUTS[layout](data((2, 4, 300, 70)))
    scale, zero_point = parameters(1, (-8, 7))
    y, clipped = cpu_fake_quantize.fake_quantize_with_clipped(x, scale, zero_point, -8, 7, [])
    assert torch.equal(y, reference.fake_quantize(x, scale, zero_point, -8, 7, []))
    assert clipped.dtype == (torch.float32 if x.numel() <= single else torch.bool)
    for grad in (data(x.shape, seed=3), data(x.shape[::-1], seed=3).permute(3, 2, 1, 0)):
        expected = reference.fake_quantize_backward(grad, x, scale, zero_point, -8, 7, [])
        assert torch.equal(cpu_fake_quantize.zero_clipped(grad, clipped), expected)
        assert torch.equal(reference.zero_clipped(grad, clipped), expected)


@pytest.mark.parametrize("learns", [False, True], ids=["fixed grid", "learnt grid"])
def test_gradients_can_be_differentiated(learns: bool) -> None:
    """A penalty on the gradient, as in adversarial training: rounding passes the second derivative of what follows."""
    torch.manual_seed(0)
    scale, zero_point = torch.tensor(0.1, requires_grad=learns), torch.tensor(0, dtype=torch.int32)
    x = torch.randn(4, 8, requires_grad=True)
    y = ffk.fake_quantize(x, scale, zero_point, -8, 7)
    (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    inside = (y.detach() > -0.75) & (y.detach() < 0.65)
    assert torch.allclose(curvature[inside], 6 * y.detach()[inside])
    assert not curvature[x.detach() < -0.9].any()

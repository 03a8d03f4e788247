"""The elementwise Triton kernels, on a GPU or in Triton's interpreter: equal to the reference."""

import pytest
import torch

pytest.importorskip("triton")

from fastforward_kernels import reference, tiling
from fastforward_kernels.triton import fake_quantize as kernels

from tests.kernels.device import DEVICE, moved, run
from tests.kernels.exact import assert_lsq_sums

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    ((5,), []),
    ((333, 70), []),
    ((40, 48), [1, -1]),
    ((40, 48), [-1, 1]),
    ((40, 96), [1, 32]),
    ((40, 96), [8, 32]),
    ((40, 96), [8, 1]),
    ((3, 7, 50), [-1, 1, -1]),
    ((2, 4, 3, 8), [1, 2, -1, 4]),
]


def arguments(shape, tile, dtype, grid=(-8, 7)):
    generator = torch.Generator().manual_seed(len(shape) + len(tile))
    count = tiling.layout(shape, tuple(tile)).blocks
    x = (torch.randn(shape, generator=generator) * 2).to(dtype)
    scale = torch.rand(count, generator=generator) * 0.2 + 0.05
    zero_point = torch.randint(grid[0], grid[1] + 1, (count,), generator=generator, dtype=torch.int32)
    return x, scale, zero_point, *grid, tile


@pytest.mark.parametrize(("shape", "tile"), CASES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_backward_and_integers(shape, tile, dtype):
    x, *grid = arguments(shape, tile, dtype)
    assert torch.equal(run(kernels.fake_quantize, x, *grid), reference.fake_quantize(x, *grid))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(
        run(kernels.fake_quantize_backward, grad, x, *grid), reference.fake_quantize_backward(grad, x, *grid)
    )
    scale, zero_point, qmin, qmax, _ = grid
    q = run(kernels.quantize, x, scale, zero_point, qmin, qmax, torch.int8, tile)
    assert torch.equal(q, reference.quantize(x, scale, zero_point, qmin, qmax, torch.int8, tile))
    y = run(kernels.dequantize, q, scale, zero_point, tile, dtype)
    assert torch.equal(y, reference.dequantize(q, scale, zero_point, tile, dtype))


@pytest.mark.parametrize(("shape", "tile"), CASES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_learnt_gradients(shape, tile, dtype):
    x, *grid = arguments(shape, tile, dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    to_x, *sums = run(kernels.fake_quantize_lsq_backward, grad, x, *grid)
    assert torch.equal(to_x, reference.fake_quantize_lsq_backward(grad, x, *grid)[0])
    assert_lsq_sums(sums, grad, x, *grid)


@pytest.mark.parametrize(("shape", "tile"), [((5, 7), []), ((40, 48), [1, -1]), ((40, 48), [-1, 1]), ((3, 5), [1, -1])])
def test_packed_mask(shape, tile):
    x, *grid = arguments(shape, tile, torch.float32)
    y, mask = run(kernels.fake_quantize_with_mask, x, *grid)
    expected = reference.fake_quantize_with_mask(x, *grid)
    assert torch.equal(y, expected[0]) and torch.equal(mask, expected[1])
    grad = torch.randn(shape)
    assert torch.equal(run(kernels.apply_mask, grad, mask), reference.apply_mask(grad, mask))


@pytest.mark.parametrize("grid", [(-128, 127), (0, 255), (0, 1), (-32768, 32767)])
def test_grids_ties_and_special_values(grid):
    steps = torch.tensor([grid[0] - 0.5, grid[0] + 0.5, grid[1] - 0.5, grid[1] + 0.5, 0.5, 1.5, -0.5, 2.5])
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0, -0.0, 1e-45])
    x = torch.cat((steps * 0.25, special))
    args = (torch.tensor(0.25), torch.tensor(0, dtype=torch.int32), *grid, [])
    y, expected = run(kernels.fake_quantize, x, *args), reference.fake_quantize(x, *args)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y[~y.isnan()], expected[~y.isnan()])


@pytest.mark.parametrize("tile", [[], [1, -1], [1, 2]])
def test_into_memory_that_exists(tile):
    x, *grid = arguments((6, 8), tile, torch.float32)
    expected = reference.fake_quantize(x, *grid)
    x, *grid = moved([x, *grid], DEVICE)
    for out in (torch.empty_like(x), torch.empty_like(x.t()).t(), x):
        kernels.fake_quantize_out(x, *grid, out)
        assert torch.equal(out.cpu(), expected)


def test_strided_tensors_keep_their_layout():
    x, *grid = arguments((6, 4, 8, 8), [-1, 1, -1, -1], torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    y = run(kernels.fake_quantize, x, *grid)
    assert torch.equal(y, reference.fake_quantize(x, *grid)) and y.stride() == x.stride()

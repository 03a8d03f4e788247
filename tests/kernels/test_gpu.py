"""The operators on a GPU as users call them: dispatch, autograd, compilers, CUDA graphs, large and empty tensors."""

import fastforward_kernels as ffk
import pytest
import torch
from fastforward_kernels import reference
from fastforward_kernels import reference_matmul as exact

pytestmark = pytest.mark.gpu

INT32 = torch.int32


@pytest.fixture
def grid():
    return torch.tensor(0.05, device="cuda"), torch.tensor(3, dtype=INT32, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_fake_quantize_is_that_of_torch(dtype, axis):
    x = torch.randn(333, 517, device="cuda").mul(4).to(dtype).requires_grad_()
    theirs_x = x.detach().clone().requires_grad_()
    if axis is None:
        scale, zero = torch.tensor(0.03, device="cuda"), torch.tensor(3, dtype=INT32, device="cuda")
        theirs = torch.fake_quantize_per_tensor_affine(theirs_x, scale, zero, -128, 127)
    else:
        scale = torch.rand(x.shape[axis], device="cuda") * 0.05 + 0.01
        zero = torch.randint(-5, 6, scale.shape, dtype=INT32, device="cuda")
        theirs = torch.fake_quantize_per_channel_affine(theirs_x, scale, zero, axis, -128, 127)
    ours = ffk.fake_quantize(x, scale, zero, -128, 127, axis=axis)
    assert torch.equal(ours, theirs)
    grad = torch.randn_like(ours)
    ours.backward(grad)
    theirs.backward(grad)
    assert torch.equal(x.grad, theirs_x.grad)


def test_into_memory_that_exists(grid):
    x = torch.randn(33, 65, device="cuda")
    assert torch.equal(
        ffk.fake_quantize_out(x, *grid, -128, 127, out=torch.empty_like(x)), ffk.fake_quantize(x, *grid, -128, 127)
    )


def test_more_than_two_to_the_31_elements(grid):
    rows, columns = 2**16 + 1, 2**15 + 8
    x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").uniform_(-8, 8)
    y = ffk.fake_quantize(x, *grid, -128, 127)
    for part in (slice(0, 4), slice(rows - 4, rows)):
        expected = reference.fake_quantize(x[part].cpu(), *(t.cpu() for t in grid), -128, 127, [])
        assert torch.equal(y[part].cpu(), expected)
    low, high = ffk.min_max(x, axis=0)
    assert torch.equal(low[-3:], x[-3:].amin(1)) and torch.equal(high[-3:], x[-3:].amax(1))


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (3, 0, 16), (2, 3, 16)])
def test_empty_and_odd_rows(shape, grid):
    packed = ffk.pack_linear_weight(
        torch.randint(-128, 128, (7, 16), dtype=torch.int8, device="cuda"), torch.rand(7, device="cuda")
    )
    x = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    y = ffk.int8_linear(x, *grid, packed)
    on_cpu = [None if t is None else t.cpu() for t in packed]
    expected = exact.int8_linear(
        x.cpu(), *(t.cpu() for t in grid), *on_cpu, None, None, "none", torch.float32, None, None
    )
    assert torch.equal(y.cpu(), expected)


def program(x, weight, grid):
    """A quantized product that is fake-quantized, in three operators of ours."""
    packed = ffk.pack_linear_weight(weight, torch.full((weight.shape[0],), 0.01, device=x.device))
    codes = ffk.quantize(x, *grid, 0, 255, torch.uint8)
    y = ffk.int8_linear(codes, *grid, packed, activation="relu", out_dtype=torch.float32)
    return ffk.fake_quantize(y, *grid, -128, 127)


def test_compiled_and_in_a_cuda_graph(grid):
    x = torch.randn(48, 256, device="cuda")
    weight = torch.randint(-128, 128, (64, 256), dtype=torch.int8, device="cuda")
    expected = program(x, weight, grid)
    for options in ({}, {"mode": "reduce-overhead"}):
        compiled = torch.compile(program, fullgraph=True, **options)
        for _ in range(3):
            assert torch.equal(compiled(x, weight, grid).clone(), expected)
    graph = torch.cuda.CUDAGraph()
    buffer = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        result = program(buffer, weight, grid)
    buffer.copy_(x)
    graph.replay()
    assert torch.equal(result, expected)


def test_opcheck(grid):
    x = torch.randn(16, 32, device="cuda", requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastforward.fake_quantize.default, (x, *grid, -128, 127, []), test_utils=checks)
    packed = ffk.pack_linear_weight(
        torch.randint(-128, 128, (8, 32), dtype=torch.int8, device="cuda"), torch.rand(8, device="cuda")
    )
    codes = torch.randint(0, 256, (16, 32), dtype=torch.uint8, device="cuda")
    arguments = (codes, *grid, *packed, None, None, "gelu", torch.bfloat16, None, None)
    torch.library.opcheck(torch.ops.fastforward.int8_linear.default, arguments, test_utils=checks[:2])

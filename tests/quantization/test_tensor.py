"""QuantizedTensor: what it stores, how it moves and changes shape, and products of integers."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

import fastforward as ff
from fastforward.exceptions import QuantizationError
from fastforward.quantization.granularity import granularity_from_block_size, min_max
from fastforward.quantization.mapping import MappingType, choose_qparams
from fastforward.quantization.static import to_affine_quantized_floatx_static, to_affine_quantized_intx_static
from fastforward.quantization.tensor import QuantizedTensor

FLOAT_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "_scaled_mm", "mv", "dot")


class Products:
    """Collects matrix products and convolutions, those inside the kernels too."""

    def __enter__(self):
        self.profile = torch.autograd.profiler.profile().__enter__()
        return self

    def __exit__(self, *exc_info):
        self.profile.__exit__(*exc_info)
        names = [event.name for event in self.profile.function_events]
        self.floating = [name for name in names if name.removeprefix("aten::") in FLOAT_PRODUCTS]
        self.integer = [name for name in names if name == "aten::_int_mm" or name.startswith("onednn::q")]


def quantized(x, dtype=torch.int8, block_size=None, mapping=MappingType.ASYMMETRIC):
    block_size = tuple(x.shape) if block_size is None else block_size
    low, high = min_max(x, granularity_from_block_size(block_size, x.shape))
    if dtype.is_floating_point:
        scale, _ = choose_qparams(low, high, MappingType.SYMMETRIC, dtype)
        return to_affine_quantized_floatx_static(x, scale, block_size, dtype)
    scale, zero_point = choose_qparams(low, high, mapping, dtype)
    return to_affine_quantized_intx_static(x, scale, zero_point, block_size, dtype)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int4, torch.uint2, torch.int16, torch.float8_e5m2])
@pytest.mark.parametrize("block_size", [(4, 8), (1, 8), (4, 1), (1, 4), (2, 4)])
def test_values_lie_within_a_step(dtype, block_size):
    x = randn(4, 8)
    q = quantized(x, dtype, block_size)
    assert q.shape == x.shape
    assert q.dtype == torch.float32
    assert q.int_repr().dtype in (torch.int8, torch.uint8, torch.int16, torch.float8_e5m2)
    steps = q.parameter_view(q.scale).repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    error = (q.dequantize() - x).abs()
    assert (error <= (x.abs() / 8 if dtype.is_floating_point else steps) * 1.001 + 1e-6).all()


def test_repr_has_the_fields_of_the_listing():
    text = repr(quantized(randn(4, 8), torch.uint8, (1, 8)).to(torch.bfloat16))
    for field in (
        "QuantizedTensor(tensor_impl=PlainTensorImpl(data=tensor([[",
        "dtype=torch.uint8)... , scale=tensor([",
    ):
        assert field in text
    for field in ("... , zero_point=tensor([", "... , _layout=PlainLayout()), block_size=(1, 8), "):
        assert field in text
    assert text.endswith("shape=torch.Size([4, 8]), device=cpu, dtype=torch.bfloat16, requires_grad=False)")


MOVES = {
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.contiguous(),
    "deepcopy": copy.deepcopy,
    "half": lambda t: t.to(torch.float16),
    "cpu": lambda t: t.cpu(),
    "t": lambda t: t.t(),
    "mT": lambda t: t.mT,
    "permute": lambda t: t.permute(1, 0),
    "unsqueeze": lambda t: t.unsqueeze(1),
    "unsqueeze_squeeze": lambda t: t.unsqueeze(0).squeeze(0),
    "rows": lambda t: t[2:6],
    "strided_rows": lambda t: t[::2],
    "row": lambda t: t[3],
    "last_row": lambda t: t[-1],
    "columns": lambda t: t[:, 4:12],
    "half_columns": lambda t: t[..., :8],
    "none": lambda t: t[:, None],
    "gather_rows": lambda t: t.index_select(0, torch.tensor([3, 1, 1])),
    "split": lambda t: t.split(4)[1],
    "chunk": lambda t: t.chunk(2)[0],
    "cat_rows": lambda t: torch.cat([t, t]),
    "cat_columns": lambda t: torch.cat([t, t], 1),
    "unbind": lambda t: t.unbind(0)[1],
}
BLOCKS = {"tensor": (8, 16), "channel": (1, 16), "group": (1, 4), "tile": (2, 8)}
LEAVES_THE_GRID = {("tile", "strided_rows"), ("tile", "gather_rows"), ("tile", "columns")}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("move", MOVES)
def test_moves_and_slices_keep_the_grid(move, blocks):
    q = quantized(randn(8, 16), torch.int8, BLOCKS[blocks])
    got = MOVES[move](q)
    want = MOVES[move](q.dequantize())
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if (blocks, move) not in LEAVES_THE_GRID:
        assert isinstance(got, QuantizedTensor)
        got = got.dequantize()
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("block_size", "shape", "kept"),
    [
        ((8, 16), (128,), True),
        ((8, 16), (2, 4, 16), True),
        ((1, 16), (2, 4, 16), True),
        ((1, 16), (8, 4, 4), True),
        ((1, 16), (16, 8), False),
        ((8, 1), (4, 2, 16), False),
    ],
)
def test_reshape_keeps_the_grid_where_blocks_stay_whole(block_size, shape, kept):
    q = quantized(randn(8, 16), torch.int8, block_size)
    got = q.reshape(shape)
    assert isinstance(got, QuantizedTensor) == kept
    assert torch.equal(got.dequantize() if kept else got, q.dequantize().reshape(shape))


def test_expand_keeps_one_scale():
    q = quantized(randn(1, 16))
    assert torch.equal(q.expand(4, 16).dequantize(), q.dequantize().expand(4, 16))


def test_cat_of_different_grids_dequantizes_or_joins():
    a, b = quantized(randn(4, 8)), quantized(randn(4, 8, seed=1) * 3)
    assert torch.equal(torch.cat([a, b]), torch.cat([a.dequantize(), b.dequantize()]))
    a, b = quantized(randn(4, 8), block_size=(1, 8)), quantized(randn(2, 8, seed=1), block_size=(1, 8))
    joined = torch.cat([a, b])
    assert isinstance(joined, QuantizedTensor)
    assert torch.equal(joined.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))


def test_other_operators_see_dequantized_values():
    q = quantized(randn(4, 8))
    values = q.dequantize()
    for function in (torch.relu, lambda t: t + 1, lambda t: t.sum(1), lambda t: F.softmax(t, -1), lambda t: 2 * t):
        assert type(function(q)) is torch.Tensor
        assert torch.equal(function(q), function(values))


def test_in_place_change_is_refused():
    with pytest.raises(QuantizationError, match="dequantize"):
        quantized(randn(4, 8)).add_(1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_saving(dtype):
    q = quantized(randn(4, 8), dtype, (1, 8))
    buffer = io.BytesIO()
    torch.save({"w": q}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["w"]
    assert isinstance(loaded, QuantizedTensor)
    assert torch.equal(loaded.int_repr().float(), q.int_repr().float())
    assert torch.equal(loaded.dequantize(), q.dequantize())
    assert loaded.block_size == q.block_size


def test_in_a_module():
    """Casting, moving and loading a module whose weight is quantized."""
    linear = torch.nn.Linear(8, 4, bias=False)
    linear.weight = torch.nn.Parameter(quantized(randn(4, 8), torch.int8, (1, 8)), requires_grad=False)
    scale = linear.weight.scale.clone()
    linear.to(torch.bfloat16)
    assert isinstance(linear.weight, QuantizedTensor)
    assert linear.weight.dtype == torch.bfloat16
    assert linear.weight.scale.dtype == torch.float32
    assert linear(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    other = copy.deepcopy(linear)
    other.weight.int_repr().zero_()
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight.int_repr(), linear.weight.int_repr())
    assert torch.equal(other.weight.scale, scale)
    with pytest.raises(RuntimeError, match="same shape and format"):
        other.load_state_dict({"weight": randn(4, 8)})


@pytest.mark.parametrize("block_size", [(1, 8), (10, 8), (1, 4)])
def test_embedding_looks_up_rows(block_size):
    table = quantized(randn(10, 8), torch.int8, block_size)
    index = torch.tensor([[3, 0], [9, 3]])
    assert torch.equal(F.embedding(index, table), F.embedding(index, table.dequantize()))


def test_nan_has_no_integer():
    with pytest.raises(ValueError, match="NaN"):
        to_affine_quantized_intx_static(torch.tensor([torch.nan]), torch.ones(1), None, (1,), torch.int8)


def test_as_parameter_in_a_state_dict():
    linear = torch.nn.Linear(8, 4, bias=False)
    linear.weight = torch.nn.Parameter(quantized(randn(4, 8), torch.int8, (1, 8)), requires_grad=False)
    other = torch.nn.Linear(8, 4, bias=False)
    other.weight = torch.nn.Parameter(quantized(randn(4, 8, seed=1), torch.int8, (1, 8)), requires_grad=False)
    other.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(other(torch.ones(1, 8)), linear(torch.ones(1, 8)))
    assert isinstance(copy.deepcopy(linear).weight, QuantizedTensor)


@pytest.mark.parametrize("x_dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("w_dtype", [torch.int8, torch.uint8, torch.int4])
@pytest.mark.parametrize("x_blocks", [(6, 32), (1, 32)])
@pytest.mark.parametrize("w_blocks", [(16, 32), (1, 32), (1, 8)])
def test_linear_multiplies_integers(x_dtype, w_dtype, x_blocks, w_blocks):
    x, w, bias = (
        quantized(randn(6, 32), x_dtype, x_blocks),
        quantized(randn(16, 32, seed=1), w_dtype, w_blocks),
        randn(16),
    )
    with Products() as seen:
        got = F.linear(x, w, bias)
    assert not seen.floating
    assert seen.integer
    torch.testing.assert_close(got, F.linear(x.dequantize(), w.dequantize(), bias), rtol=1e-5, atol=1e-4)


def test_linear_of_three_axes_and_bfloat16():
    x, w = quantized(randn(2, 3, 32)).to(torch.bfloat16), quantized(randn(16, 32, seed=1), torch.int8, (1, 32))
    got = F.linear(x, w.to(torch.bfloat16))
    assert got.shape == (2, 3, 16)
    assert got.dtype == torch.bfloat16
    want = F.linear(x.dequantize(torch.float32), w.dequantize())
    torch.testing.assert_close(got, want.to(torch.bfloat16))


def test_linear_sums_are_exact():
    """127 * 127 * 4096 overflows float32's 24 bits, not int32."""
    depth = 4096
    x = QuantizedTensor(torch.full((1, depth), 127, dtype=torch.int8), torch.ones(1), None, (1, depth))
    w_data = torch.full((1, depth), 127, dtype=torch.int8)
    w_data[0, 0] = 126
    w = QuantizedTensor(w_data, torch.ones(1), None, (1, depth))
    assert F.linear(x, w).item() == torch.tensor(127 * 127 * depth - 127, dtype=torch.float32).item()


@pytest.mark.parametrize(
    "shapes", [((4, 8), (8, 5)), ((2, 4, 8), (2, 8, 5)), ((2, 3, 4, 8), (2, 3, 8, 5)), ((2, 4, 8), (8, 5))]
)
def test_matmul_multiplies_integers(shapes):
    a, b = quantized(randn(*shapes[0])), quantized(randn(*shapes[1], seed=1))
    with Products() as seen:
        got = a @ b
    assert not seen.floating
    assert seen.integer
    torch.testing.assert_close(got, a.dequantize() @ b.dequantize(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("arguments", [{}, {"stride": 2, "padding": 1}, {"padding": (1, 2), "dilation": 2}])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("mapping", MappingType)
def test_conv2d_multiplies_integers(arguments, groups, dtype, mapping):
    x = quantized(randn(2, 4, 9, 8), dtype)
    kernel, bias = randn(8, 4 // groups, 3, 3, seed=1), randn(8)
    weight = quantized(kernel, torch.int8, (1, 4 // groups, 3, 3), mapping)
    with Products() as seen:
        got = F.conv2d(x, weight, bias, groups=groups, **arguments)
    assert not seen.floating
    want = F.conv2d(x.dequantize(), weight.dequantize(), bias, groups=groups, **arguments)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_mixed_and_float8_operands_dequantize():
    x, w = randn(4, 32), quantized(randn(16, 32, seed=1), torch.float8_e4m3fn, (1, 32))
    torch.testing.assert_close(F.linear(x, w), F.linear(x, w.dequantize()))
    q = quantized(x, torch.float8_e4m3fn)
    torch.testing.assert_close(F.linear(q, w), F.linear(q.dequantize(), w.dequantize()), rtol=1e-5, atol=1e-4)


def test_wrong_target_types():
    x, one = randn(2, 2), torch.ones(1)
    with pytest.raises(TypeError, match="floatx"):
        to_affine_quantized_intx_static(x, one, None, (2, 2), torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="intx"):
        to_affine_quantized_floatx_static(x, one, (2, 2), torch.int8)
    with pytest.raises(ValueError, match="do not fit"):
        to_affine_quantized_intx_static(x, torch.ones(3), None, (1, 2), torch.int8)
    with pytest.raises(ValueError, match="divide"):
        to_affine_quantized_intx_static(x, torch.ones(2), None, (1, 3), torch.int8)
    with pytest.raises(TypeError, match="integer or float8"):
        to_affine_quantized_intx_static(x, one, None, (2, 2), torch.float32)


def test_public_names():
    assert ff.QuantizedTensor is QuantizedTensor
    assert ff.to_affine_quantized_intx_static is to_affine_quantized_intx_static
    assert ff.MappingType is MappingType

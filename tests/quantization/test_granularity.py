"""Block sizes, parameter shapes and reductions of every granularity."""

import pytest
import torch

import fastforward as ff
from fastforward.quantization.granularity import (
    PerAxis,
    PerBlock,
    PerChannel,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PerToken,
    granularity_from_block_size,
    min_max,
    rows_by_block,
)

CASES = [
    (PerTensor(), (2, 4, 6), (2, 4, 6), ()),
    (PerChannel(0), (2, 4, 6), (1, 4, 6), (2,)),
    (PerChannel(-1), (2, 4, 6), (2, 4, 1), (6,)),
    (PerChannel((0, 2)), (2, 4, 6), (1, 4, 1), (2, 6)),
    (PerAxis(axis=1), (2, 4, 6), (2, 1, 6), (4,)),
    (PerGroup(3), (2, 4, 6), (1, 1, 3), (2, 4, 2)),
    (PerRow(), (2, 4, 6), (1, 1, 6), (2, 4)),
    (PerRow(1), (2, 4, 6), (1, 4, 1), (2, 6)),
    (PerToken(), (2, 4, 6), (1, 1, 6), (2, 4)),
    (PerTile((1, 2, -1)), (2, 4, 6), (1, 2, 6), (2, 2, 1)),
    (PerBlock(2, 3), (2, 4, 6), (2, 4, 3), (1, 1, 2)),
    (PerBlock((1, 2), (2, 3), 0), (2, 4, 6), (1, 2, 3), (2, 2, 2)),
    (PerBlock(block_size=(1, 4, 3)), (2, 4, 6), (1, 4, 3), (2, 1, 2)),
]


@pytest.mark.parametrize(("granularity", "shape", "block_size", "parameter_shape"), CASES, ids=lambda v: str(v))
def test_blocks_and_reductions(granularity, shape, block_size, parameter_shape):
    assert granularity.block_size(shape) == block_size
    assert granularity.parameter_shape(shape) == parameter_shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    low, high = min_max(x, granularity)
    rows, rows_shape = rows_by_block(x, granularity)
    assert rows_shape == parameter_shape
    assert torch.equal(low, rows.amin(1).reshape(parameter_shape))
    assert torch.equal(high, rows.amax(1).reshape(parameter_shape))
    # the first block, cut out by hand
    assert low.flatten()[0] == x[tuple(slice(size) for size in block_size)].min()


@pytest.mark.parametrize(
    ("granularity", "shape", "error"),
    [
        (PerGroup(4), (2, 6), ValueError),
        (PerChannel(2), (2, 6), IndexError),
        (PerTile((1, 2)), (2, 6, 2), ValueError),
        (PerTile((1, 4)), (2, 6), ValueError),
        (PerGroup(4), (), ValueError),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(granularity, shape, error):
    with pytest.raises(error):
        granularity.parameter_shape(shape)


def test_bad_arguments():
    with pytest.raises(ValueError, match="group_size"):
        PerGroup(0)
    with pytest.raises(ValueError, match="same length"):
        PerBlock((0, 1), (2,))
    with pytest.raises(ValueError, match="either"):
        PerBlock()


def test_per_axis_is_per_channel():
    assert PerAxis(axis=1) == PerChannel(1)
    assert hash(PerAxis(axis=1)) == hash(PerChannel(1))
    assert PerAxis(axis=1) != PerChannel(0)
    assert repr(PerAxis(axis=1)) == "PerAxis(axis=1)"
    assert ff.PerAxis is PerAxis


@pytest.mark.parametrize(
    ("block_size", "shape", "granularity"),
    [
        ((4, 8), (4, 8), PerTensor()),
        ((1, 8), (4, 8), PerChannel(0)),
        ((4, 1), (4, 8), PerChannel(1)),
        ((1, 4), (4, 8), PerTile((1, 4))),
    ],
)
def test_granularity_from_block_size(block_size, shape, granularity):
    assert granularity_from_block_size(block_size, shape) == granularity


@pytest.mark.parametrize("quantizer", [ff.nn.DynamicLinearQuantizer(8), ff.nn.DynamicFloat8Quantizer()], ids=repr)
def test_ranges_of_transposed_tensors_of_any_size_are_compiled(quantizer: torch.nn.Module) -> None:
    compiled = torch.compile(lambda x: quantizer(x.transpose(1, 2)), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5, 8), (3, 7, 4)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), quantizer(x.transpose(1, 2)))

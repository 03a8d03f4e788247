"""Tiles to views: which elements share parameters."""

import pytest
import torch
from fastforward_kernels import tiling

LAYOUTS = [  # shape, tile, view, parameters, inside, grid
    ((4, 6), [], (24,), (1,), (0,), (1, 1)),
    ((4, 6), [1, -1], (4, 6), (4, 1), (1,), (4, 1)),
    ((4, 6), [-1, 1], (4, 6), (1, 6), (0,), (1, 6)),
    ((4, 6), [1, 3], (8, 3), (8, 1), (1,), (4, 2)),
    ((4, 6), [2, 3], (2, 2, 2, 3), (2, 1, 2, 1), (1, 3), (2, 2)),
    ((2, 3, 4, 5), [-1, 1, -1, -1], (2, 3, 20), (1, 3, 1), (0, 2), (1, 3, 1, 1)),
    ((4, 6), [1, 1], (24,), (24,), (), (4, 6)),
    ((1, 1), [1, 1], (1,), (1,), (0,), (1, 1)),
    ((0, 6), [1, -1], (0, 6), (0, 1), (1,), (0, 1)),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layout(case):
    shape, tile, *expected = case
    assert list(tiling.layout(shape, tuple(tile))) == expected


@pytest.mark.parametrize(("arguments", "tile"), [
    ((3, None, None), []),
    ((3, 1, None), [-1, 1, -1]),
    ((3, -1, None), [-1, -1, 1]),
    ((3, None, 32), [1, 1, 32]),
    ((3, 0, 2), [2, -1, -1]),
])  # fmt: skip
def test_tile_of_an_axis_or_a_group(arguments, tile):
    assert tiling.tile_for(*arguments) == tile


def test_views_cut_the_tensor_into_its_blocks():
    x = torch.arange(24.0).reshape(4, 6)
    plan = tiling.layout((4, 6), (2, 3))
    blocks = x.reshape(plan.view).amax(plan.inside)
    assert blocks.tolist() == [[8.0, 11.0], [20.0, 23.0]]


@pytest.mark.parametrize("tile", [[1, 4], [3, -1], [1], [1, 0]])
def test_a_tile_must_divide(tile):
    with pytest.raises(ValueError, match="does not divide"):
        tiling.layout((4, 6), tuple(tile))

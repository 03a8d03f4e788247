"""Rounding to codes: memory is used again, but never while somebody still holds what is in it."""

import copy
import pickle
import threading

import pytest
import torch

from fastforward.integer import rounding
from fastforward.integer.grid import Grid

SCALE, POINT = 0.05, 100


def expected(x: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(x, SCALE, POINT, torch.quint8).int_repr()


@pytest.fixture
def rounds() -> rounding.Rounding:
    """After two calls with values of one shape, so that it has memory for a third."""
    rounds = rounding.Rounding(SCALE, POINT)
    for _ in range(2):
        rounds(torch.randn(4, 8))
    return rounds


def test_results_take_the_memory_of_those_nobody_holds(rounds: rounding.Rounding) -> None:
    places = set()
    for _ in range(3):
        x = torch.randn(4, 8)
        codes = rounds(x)
        assert torch.equal(codes, expected(x))
        places.add(codes.data_ptr())
        del codes
    assert len(places) == 1


def test_what_rounds_to_the_middle_or_has_no_integer_rounds_as_in_new_memory(rounds: rounding.Rounding) -> None:
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30])
    middles = (torch.arange(28) - 8.5) * SCALE
    x = torch.cat((strange, middles)).view(4, 8)
    assert torch.equal(rounds(x), rounding.quantize_uint8(x, SCALE, POINT))


@pytest.mark.parametrize("held", [lambda codes: codes, lambda codes: codes[1:], lambda codes: codes.t()])
def test_codes_that_are_held_stay_as_they_are(rounds: rounding.Rounding, held) -> None:
    kept = held(rounds(torch.randn(4, 8)))
    before = kept.clone()
    for _ in range(3):
        x = torch.randn(4, 8)
        assert torch.equal(rounds(x), expected(x))
    assert torch.equal(kept, before)


def test_threads_get_memory_of_their_own(rounds: rounding.Rounding) -> None:
    wrong = []

    def work(seed: int) -> None:
        x = torch.full((4, 8), SCALE * seed)
        for _ in range(300):
            codes = rounds(x)
            if not bool((codes == POINT + seed).all()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_layouts_types_and_modes(rounds: rounding.Rounding) -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 8), requires_grad=False)
    image = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    for x in (torch.randn(8, 4).t(), parameter, image, torch.randn(0, 8), torch.randn(4, 8)):
        for _ in range(3):
            codes = rounds(x)
            assert torch.equal(codes, expected(x))
            assert codes.is_contiguous(memory_format=torch.channels_last) or x is not image
            del codes
    fresh = rounding.Rounding(SCALE, POINT)
    x = torch.randn(2, 3)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(fresh(x), expected(x))
    for _ in range(3):
        assert torch.equal(fresh(x), expected(x)), "memory made in inference mode serves outside of it"


def test_large_results_get_new_memory() -> None:
    rounds = rounding.Rounding(SCALE, POINT)
    x = torch.randn(1, rounding._LARGEST + 1)
    for _ in range(3):
        assert torch.equal(rounds(x), expected(x))
    assert rounds._kept is None


def test_copies_of_a_grid_share_no_memory() -> None:
    grid, x = Grid(SCALE, POINT), torch.randn(4, 8)
    for _ in range(3):
        grid.codes(x)
    for other in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        codes = other.codes(x)
        other.codes(x), other.codes(x)
        assert torch.equal(codes, grid.codes(x))
        assert codes.data_ptr() != grid.codes(x).data_ptr()

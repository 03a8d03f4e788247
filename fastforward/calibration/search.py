"""Search for the range with the least error, one range per block, all blocks at once."""

from collections.abc import Callable

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]


def best_range(
    low: Tensor, high: Tensor, measure: Measure, candidates: int, *, each_side: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the shrunk ranges of least error.

    Both bounds shrink together first; then each alone, which is of no use where the grid is symmetric.

    Args:
        low: lower bounds of the values, ``[blocks]``, at most zero.
        high: upper bounds, at least zero.
        measure: error of each block for given bounds; a lower value is better.
        candidates: number of fractions tried in each of the three searches.
        each_side: whether to let the bounds shrink alone.
    """
    fractions = torch.arange(1, candidates + 1, device=low.device, dtype=low.dtype) / candidates
    best = (low, high)
    error = measure(*best)
    for fraction in fractions[:-1]:
        best, error = _better(best, error, (low * fraction, high * fraction), measure)
    if not each_side:
        return best
    start = best
    for fraction in fractions[:-1]:
        best, error = _better(best, error, (low * fraction, start[1]), measure)
    start = best
    for fraction in fractions[:-1]:
        best, error = _better(best, error, (start[0], high * fraction), measure)
    return best


def _better(
    best: tuple[Tensor, Tensor], error: Tensor, trial: tuple[Tensor, Tensor], measure: Measure
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    trial_error = measure(*trial)
    wins = trial_error < error
    chosen = torch.where(wins, trial[0], best[0]), torch.where(wins, trial[1], best[1])
    return chosen, torch.where(wins, trial_error, error)

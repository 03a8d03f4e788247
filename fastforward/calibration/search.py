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
        measure: error of each block for given bounds; a lower value is better. Where there is one block only it
            gets many bounds at once, and returns an error for each.
        candidates: number of fractions tried in each of the three searches.
        each_side: whether to let the bounds shrink alone.
    """
    best, error = (low, high), measure(low, high)
    fractions = torch.arange(1, candidates, device=low.device, dtype=low.dtype)[:, None] / candidates
    if not len(fractions):
        return best
    lows, highs = low * fractions, high * fractions
    best, error = _better(best, error, (lows, highs), measure)
    if each_side:
        best, error = _better(best, error, (lows, best[1].expand_as(highs)), measure)
        best, error = _better(best, error, (best[0].expand_as(lows), highs), measure)
    return best


def _better(
    best: tuple[Tensor, Tensor], error: Tensor, trials: tuple[Tensor, Tensor], measure: Measure
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """What has the least error among ``best`` and ``trials`` (``[trials, blocks]``), the earlier one of equals."""
    if len(error) == 1:
        errors = measure(trials[0].flatten(), trials[1].flatten())[:, None]
    else:  # one after another, for what is measured of all blocks may be large
        errors = torch.stack([measure(*bounds) for bounds in zip(*trials, strict=True)])
    low, high, errors = (torch.cat([a[None], b]) for a, b in zip((*best, error), (*trials, errors), strict=True))
    first = errors.argmin(0, keepdim=True)
    return (low.gather(0, first)[0], high.gather(0, first)[0]), errors.gather(0, first)[0]

"""How rounding errors of some input features of a linear layer are made up for by the features not rounded yet.

In comes a sample ``X`` of the layer's inputs, out comes what error feedback needs of their damped second moments
``M = X^T X + damping``. With ``M = R R^T``, ``R`` upper triangular, and ``E = W - Q`` the errors of the features before
``j``, the value to round at ``j`` is ``W[j] + R[:j, j]^T E[:j] / R[j, j]``. Chee et al., "QuIP: 2-Bit Quantization of
Large Language Models With Guarantees", 2023, theorem 6, show that this is what GPTQ does with a factor of the inverse
of ``M``; so the inverse is not needed.

Where rows are few, ``M`` is not made either. The Schur complement of the features behind a block ``B`` is
``damping + B^T P B`` with ``P = (1 + Y Y^T / damping)^-1`` and ``Y`` the features behind (the matrix inversion lemma):
a matrix of the rows' size, from which each block, the last one first, takes a product away.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST_DAMPING = 1e-6
"""The least that is tried where none at all does not do."""
_LARGEST_DAMPING = 1e6
_FEW = 3
"""Rows are few where there are so many times as many features: about there both ways take equally long."""
_BLOCK = 64
"""Features of a block where rows are few."""
_PANEL = 256
"""Lines of the second moments that are made at once: what lies below the diagonal need not be multiplied."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive features in the order of rounding, and what errors do to their values.

    Attributes:
        within: ``[features, features]``: the error of the row's feature times this is added to the value of the
            column's, where that comes later.
        carried: ``[rows, features]``: the error that earlier blocks have caused in the product with each row, times
            this, is added to the values; ``None`` where there is one block only.
        inputs: ``[rows, features]``, by which errors in this block change those products; likewise.
    """

    within: Tensor
    carried: Tensor | None = None
    inputs: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What a sample of inputs says about how errors add up.

    Attributes:
        order: The features as they are to be rounded, those of largest second moment first.
        blocks: They cover all features, in that order.
    """

    order: Tensor
    blocks: Sequence[Block]


def feedback(rows: Tensor, held_out: int, damping: float, *, centred: bool) -> tuple[Feedback, Feedback] | None:
    """The feedback of all but the rows held out, and that of all rows.

    Args:
        rows: Float32 ``[rows, features]``.
        held_out: How many of the first rows are held out: at least one, not all.
        damping: Added to the diagonal of the second moments, relative to its mean. It grows until there is a factor.
        centred: Whether the rows' mean does not matter.

    Returns:
        ``None`` if either sample says nothing: there is no factor, or its rows are all zero.
    """
    if len(rows) * _FEW <= rows.shape[1]:
        found = [_from_few(_centred(part, centred), damping) for part in (rows[held_out:], rows)]
    else:
        moments = _second_moments(rows, held_out, centred)
        found = [_from_moments(moments.pop(0), damping) for _ in range(2)]  # each is let go of when it has served
    return None if found[0] is None or found[1] is None else (found[0], found[1])


class LastFeedback:
    """Remembers the feedback asked for last: query, key and value layers follow each other and read the same rows."""

    def __init__(self) -> None:
        self._rows = torch.empty(0)
        self._rest: tuple[int, float, bool] | None = None
        self._known: tuple[Feedback, Feedback] | None = None

    def get(self, rows: Tensor, held_out: int, damping: float, *, centred: bool) -> tuple[Feedback, Feedback] | None:
        """As :func:`feedback`."""
        rest = held_out, damping, centred
        same = rest == self._rest and rows.device == self._rows.device and torch.equal(rows, self._rows)
        if not same:
            self._known = None  # first, so that its memory is free
            self._known = feedback(rows, held_out, damping, centred=centred)
            self._rows, self._rest = rows, rest
        return self._known


def _centred(rows: Tensor, centred: bool) -> Tensor:
    return rows - rows.mean(0) if centred else rows


def _second_moments(rows: Tensor, held_out: int, centred: bool) -> list[Tensor]:
    """``X^T X`` of the rows that are not held out, and of all, float64 ``[features, features]``."""
    rows = rows.to(torch.float64, copy=True)  # features' spread is wider than the square root of float32's precision
    parts = held, seen = rows[:held_out], rows[held_out:]
    means = [part.mean(0) for part in parts]
    if centred:
        for part, mean in zip(parts, means, strict=True):
            part -= mean
    moments = _products(seen)
    every = _products(held).add_(moments)
    if centred:  # Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979
        apart = means[0] - means[1]
        every.addr_(apart, apart, alpha=len(held) * len(seen) / len(rows))
    return [moments, every]


def _products(rows: Tensor) -> Tensor:
    """``X^T X``, of which only one half is multiplied."""
    features = rows.shape[1]
    result = rows.new_empty(features, features)
    for start in range(0, features, _PANEL):
        end = min(start + _PANEL, features)
        torch.mm(rows[:, start:end].t(), rows[:, start:], out=result[start:end, start:])
        result[end:, start:end] = result[start:end, end:].t()
    return result


def _order(squares: Tensor) -> Tensor:
    return squares.argsort(descending=True, stable=True)


def _from_moments(moments: Tensor, damping: float) -> Feedback | None:
    """One block of all features."""
    average, added = float(moments.diagonal().mean()), 0.0
    order = _order(moments.diagonal())
    backwards = order.flip(0)  # read backwards, a lower factor is an upper one
    moments = moments[backwards[:, None], backwards]
    while average > 0 and damping <= _LARGEST_DAMPING:
        moments.diagonal().add_((damping - added) * average)
        added = damping
        lower, failure = torch.linalg.cholesky_ex(moments)
        if not int(failure):
            lower /= lower.diagonal().clone()
            return Feedback(order, [Block(lower.to(torch.float32).flip(0, 1))])
        damping = max(10 * damping, _SMALLEST_DAMPING)
    return None


def _from_few(rows: Tensor, damping: float) -> Feedback | None:
    """Small blocks of features; of fewer rows than features, so that there has to be damping."""
    squares = rows.double().square_().sum(0)
    average, damping = float(squares.mean()), max(damping, _SMALLEST_DAMPING)
    order = _order(squares)
    rows = rows[:, order]
    while average > 0 and damping <= _LARGEST_DAMPING:
        blocks = _blocks(rows, damping * average)
        if blocks is not None:
            return Feedback(order, blocks)
        damping *= 10
    return None


def _blocks(rows: Tensor, damping: float) -> list[Block] | None:
    """``damping`` is absolute here; ``None`` if a factor does not exist."""
    behind = torch.eye(len(rows), dtype=torch.float64, device=rows.device)  # `P` of the module's docstring
    blocks, failures = [], []
    for inputs in reversed(rows.split(_BLOCK, 1)):
        exact = inputs.double()
        moved = behind @ exact
        schur = exact.t() @ moved
        schur.diagonal().add_(damping)
        lower, failure = torch.linalg.cholesky_ex(schur.flip(0, 1))
        upper = lower.flip(0, 1)
        carried = torch.linalg.solve_triangular(upper.t(), moved, upper=False, left=False)
        behind.addmm_(carried, carried.t(), alpha=-1)
        within, carried = ((part / upper.diagonal()).to(torch.float32) for part in (upper, carried))
        blocks.append(Block(within, carried, inputs))
        failures.append(failure)
    return None if bool(torch.stack(failures).any()) else blocks[::-1]

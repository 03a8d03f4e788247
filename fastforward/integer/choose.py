"""Choosing among ways to compute the same thing, by measurement."""

import time
from collections.abc import Callable
from typing import Any

import torch

_ROUNDS = 7
_SECONDS = 0.05
"""Fast candidates take more rounds than those, until so much time is spent."""
_MARGIN = 1.03
_CPU = torch.device("cpu")


def fastest(candidates: dict[str, Callable[[], Any]], device: torch.device = _CPU) -> str:
    """Return the name of the fastest candidate on ``device``; a later one must win by 3 %: the most exact come first.

    Candidates run in turn, and the minimum of each counts: on a busy machine other processes only ever add time. With
    one thread it is the processor's time, which does not count that of others.
    """
    clock = _clock(device)
    best = {name: float("inf") for name in candidates}
    rounds, end = 0, time.perf_counter() + _SECONDS
    while rounds < _ROUNDS or time.perf_counter() < end:
        rounds += 1
        for name, run in candidates.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    names = list(candidates)
    winner = names[0]
    for name in names[1:]:
        if best[name] * _MARGIN < best[winner]:
            winner = name
    return winner


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds until the device has done what it was given."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def finished() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return finished

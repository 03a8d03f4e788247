"""Choosing among ways to compute the same thing, by measurement."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

_ROUNDS = 7
_SECONDS = 0.05
"""Fast candidates take more rounds than those, until so much time is spent."""
_MARGIN = 1.03
_FIRST_CALLS = 3
_FAR = 2.0
"""After the first calls candidates are left out that took so many times as long as the fastest."""
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
    return _winner(best)


@dataclasses.dataclass
class Trial:
    """Candidates that are timed where they are used: each once per call of a layer, between the other layers.

    Where a layer reads much and computes little, what counts is whether its weight comes from a cache, and calling it
    over and over would tell the wrong thing.

    Attributes:
        best: The least seconds that each candidate took; the first call, which prepares them, does not count.
        calls: How often all have run.
    """

    best: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: int = 0

    @property
    def decided(self) -> bool:
        """Whether they have run often enough, or all but one are far behind."""
        return self.calls > _ROUNDS or (self.calls >= _FIRST_CALLS and len(self._left()) == 1)

    def _left(self) -> list[str]:
        """The candidates that may still win."""
        if self.calls < _FIRST_CALLS:
            return list(self.best)
        least = min(self.best.values())
        return [name for name, seconds in self.best.items() if seconds <= _FAR * least]

    def run(self, candidates: dict[str, Callable[[], Any]], device: torch.device = _CPU) -> Any:
        """Run every candidate that may win once, each time in another order, and return what one of them gave."""
        clock, names = _clock(device), self._left() or list(candidates)
        first = self.calls % len(names)
        for name in (*names[first:], *names[:first]):
            start = clock()
            result = candidates[name]()
            taken = clock() - start
            self.best[name] = min(self.best[name], taken) if self.calls > 1 else taken
        self.calls += 1
        return result

    def winner(self) -> str:
        """The fastest so far; a later one must win by 3 %."""
        return _winner(self.best)


def _winner(best: dict[str, float]) -> str:
    names = list(best)
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

"""Several processes that calibrate one model: whether there are, and that all of them fail if one does."""

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed

from fastforward.exceptions import CalibrationError

_PREFIX = "fastforward/estimate_ranges"
_PATIENCE = datetime.timedelta(minutes=30)
"""How long the others are waited for: as long as torch's collectives wait by default."""


def several() -> bool:
    """Whether this is one of several processes of ``torch.distributed``."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Raise in every process at the end of the block if the block has raised in one of them.

    What happened is left in the process group's store, not sent by a collective: the process that fails waits for
    nobody, and cannot meet another collective that the others are in.

    Raises:
        CalibrationError: The block has raised in another process; the message says what and where.
    """
    if not several():
        yield
        return
    try:
        yield
    except BaseException as error:
        _leave_word(f"{type(error).__name__}: {error}")
        raise
    round_ = _leave_word("")
    failures = {rank: word for rank, word in enumerate(_words(round_)) if word}
    if failures:
        rank, word = next(iter(failures.items()))
        msg = f"estimate_ranges: process {rank} raised {word}. No process has set ranges; see that process's traceback"
        raise CalibrationError(msg)


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store  # not there in every build of torch

    return _get_default_store()


def _leave_word(word: str) -> int:
    """Say how this process came out of its block; returns the number of the block, which all processes count alike."""
    store, rank = _store(), torch.distributed.get_rank()
    round_ = store.add(f"{_PREFIX}/{rank}", 1)
    store.set(f"{_PREFIX}/{rank}/{round_}", word)
    return int(round_)


def _words(round_: int) -> list[str]:
    """What every process has left, as soon as all have: data may take one of them much longer than another."""
    store = _store()
    keys = [f"{_PREFIX}/{rank}/{round_}" for rank in range(torch.distributed.get_world_size())]
    store.wait(keys, _PATIENCE)
    return [bytes(store.get(key)).decode() for key in keys]

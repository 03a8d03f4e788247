"""Several processes that calibrate one model: whether there are, and that all of them fail if one does."""

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed

from fastforward.exceptions import CalibrationError

_PREFIX = "fastforward/failing_together"
_PATIENCE = datetime.timedelta(minutes=30)
"""How long the others are waited for: as long as torch's collectives wait by default."""
_KNOWN = "_known_to_all_processes"
"""Set on an exception that the other processes raise as well, or have raised: nobody is to hear of it twice."""

_open_blocks = 0


def several() -> bool:
    """Whether this is one of several processes of ``torch.distributed``."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


@contextlib.contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Raise in every process if the block raises in one of them: at the end of the block, or before a collective in it.

    What happened is left in the process group's store, not sent by a collective: the process that fails waits for
    nobody, and cannot meet another collective that the others are in. Blocks may be nested; one that fails outside an
    inner block is heard of where the others next look, which may be in that block.

    Args:
        what: The step, for the message.

    Raises:
        CalibrationError: The block has raised in another process; the message says what and where.
    """
    global _open_blocks  # noqa: PLW0603
    if not several():
        yield
        return
    _open_blocks += 1
    try:
        yield
        _raise_with_others()
    except BaseException as error:
        if not getattr(error, _KNOWN, False):
            _leave_word(f"{what}: process {torch.distributed.get_rank()} raised {type(error).__name__}: {error}")
            setattr(error, _KNOWN, True)
        raise
    finally:
        _open_blocks -= 1


def require_others() -> None:
    """Raise if another process has left the present block by an exception: before a collective, it would be waited for.

    Raises:
        CalibrationError: It has; the message says what and where.
    """
    if _open_blocks:
        _raise_with_others()


def _raise_with_others() -> None:
    failure = next((word for word in _words(_leave_word("")) if word), None)
    if failure is not None:
        error = CalibrationError(f"{failure}. No process goes on; see that process's traceback")
        setattr(error, _KNOWN, True)
        raise error


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store  # not there in every build of torch

    return _get_default_store()


def _leave_word(word: str) -> int:
    """Say how this process is doing; returns how often it has, which all processes count alike."""
    store, rank = _store(), torch.distributed.get_rank()
    round_ = int(store.add(f"{_PREFIX}/{rank}", 1))
    store.set(f"{_PREFIX}/{rank}/{round_}", word)
    return round_


def _words(round_: int) -> list[str]:
    """What every process has left, as soon as all have: data may take one of them much longer than another."""
    store = _store()
    keys = [f"{_PREFIX}/{rank}/{round_}" for rank in range(torch.distributed.get_world_size())]
    store.wait(keys, _PATIENCE)
    # Whoever has left a word in this round has read those of the last one.
    store.delete_key(f"{_PREFIX}/{torch.distributed.get_rank()}/{round_ - 1}")
    return [bytes(store.get(key)).decode() for key in keys]

"""How Linux maps memory: large results in one call, which is cheaper than one page fault after another.

Huge pages would halve that cost again where the machine has them ready, but on a busy virtual machine they were seen
to cost five times as much. Weights that are read over and over are worth it.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 1 << 22  # bytes; smaller results usually come from memory that is mapped already
PAGE = 4096
HUGE_PAGE = 1 << 21
MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels refuse it and the pages fault in as usual
MADV_COLLAPSE = 25  # Linux 6.1; older kernels refuse it and the pages stay small


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def mapped(fresh: Tensor) -> Tensor:
    """Map the pages behind a CPU tensor that nothing has been written to yet, and return it."""
    storage = fresh.untyped_storage()
    madvise = _madvise() if storage.nbytes() >= LARGE else None
    if madvise is not None:
        start = -(-storage.data_ptr() // PAGE) * PAGE
        madvise(start, storage.nbytes() // PAGE * PAGE - PAGE, MADV_POPULATE_WRITE)
    return fresh


def empty_like(x: Tensor) -> Tensor:
    """Return ``torch.empty_like(x)``, large ones mapped."""
    return mapped(torch.empty_like(x))


def use_huge_pages(address: int, size: int) -> None:
    """Move ``size`` bytes to huge pages where they fill them and Linux has them: streaming them is a tenth faster."""
    start, end = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
    madvise = _madvise() if end > start else None
    if madvise is not None:
        madvise(start, end - start, MADV_COLLAPSE)

"""Fresh memory for large results: Linux maps it in one call, which is cheaper than one page fault after another.

Huge pages would halve that cost again where the machine has them ready, but on a busy virtual machine they were seen
to cost five times as much.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 1 << 22  # bytes; smaller results usually come from memory that is mapped already
PAGE = 4096
MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels refuse it and the pages fault in as usual


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

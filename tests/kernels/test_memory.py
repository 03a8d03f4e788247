"""How memory is mapped."""

import pytest
import torch
from fastforward_kernels import memory

MEGABYTE = 1 << 20


def test_huge_pages_are_asked_for_inside_the_range_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: calls.append(call))
    memory.use_huge_pages(3 * MEGABYTE, 6 * MEGABYTE)
    memory.use_huge_pages(3 * MEGABYTE, 2 * MEGABYTE)
    assert calls == [(4 * MEGABYTE, 4 * MEGABYTE, memory.MADV_COLLAPSE)]


def test_huge_pages_keep_what_memory_holds() -> None:
    x = torch.arange(2 * MEGABYTE)
    memory.use_huge_pages(x.data_ptr(), x.nbytes)
    assert torch.equal(x, torch.arange(2 * MEGABYTE))

"""Images between torch's memory layout and the kernels'."""

import pytest
import torch

from fastforward.integer.layout import contiguous, laid_out, padded


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 64, 33, 35), (1, 16, 64, 64), (2, 3, 4, 5, 6), (4, 8)])
def test_contiguous_is_torchs(shape: tuple[int, ...]) -> None:
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    x = torch.randn(shape).contiguous(memory_format=memory)
    assert torch.equal(contiguous(x), x)
    assert contiguous(x).is_contiguous()


@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_and_channels_innermost(channels: int, dims: int) -> None:
    memory = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)[dims - 1]
    x = torch.randint(0, 255, (2, channels, *range(4, 4 + dims)), dtype=torch.uint8)
    padding = list(range(1, 1 + dims))
    around = [size for size in reversed(padding) for _ in range(2)]
    for given in (x, x.contiguous(memory_format=memory)):
        assert torch.equal(laid_out(given, memory), x)
        assert laid_out(given, memory).is_contiguous(memory_format=memory)
        assert torch.equal(padded(given, padding, 7, memory), torch.nn.functional.pad(x, around, value=7))
        assert padded(given, padding, 7, memory).is_contiguous(memory_format=memory)

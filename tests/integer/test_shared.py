"""What several layers make of the same tensor."""

import torch

from fastforward.integer.shared import shared


def test_the_latest_conversion_of_a_tensor_is_kept() -> None:
    x, converted = torch.randn(2, 8), []

    def halves(x: torch.Tensor) -> torch.Tensor:
        converted.append(x)
        return x / 2

    assert torch.equal(shared(x, halves), shared(x, halves))
    assert len(converted) == 1
    assert torch.equal(shared(x, torch.neg), -x), "another conversion is another result"
    x.add_(1)
    assert torch.equal(shared(x, halves), x / 2)

"""What several layers make of the same tensor."""

import torch

from fastforward.integer.shared import forget, shared


def test_the_latest_conversion_of_a_tensor_is_kept() -> None:
    x, converted = torch.randn(2, 8), []

    def halves(x: torch.Tensor) -> torch.Tensor:
        converted.append(x)
        return x / 2

    assert torch.equal(shared(x, halves), shared(x, halves))
    assert len(converted) == 1
    assert torch.equal(shared(x, torch.neg), -x), "another conversion is another result"
    shared(x, halves)
    assert len(converted) == 1, "and takes the place of none"
    forget()
    shared(x, halves)
    assert len(converted) == 2
    x.add_(1)
    assert torch.equal(shared(x, halves), x / 2)

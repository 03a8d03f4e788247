"""FloatCopy: integer linear layers that may also keep their weight as floats, where integers lose."""

import torch


class FloatCopy(torch.nn.Linear):
    """A linear layer that computes in floats without anything being quantized on the way."""

    _float_weight: torch.Tensor | None

    def float_weight(self) -> torch.Tensor:
        """The weight that an input, as it arrives, is multiplied by: computed from the integers."""
        raise NotImplementedError

    def in_floats(self, x: torch.Tensor) -> torch.Tensor:
        """The product of floats, in the dtype of ``x``."""
        weight, bias = self._float_weight, self._parameters["bias"]
        if weight is None or weight.dtype != x.dtype:
            weight = self._float_weight = self.float_weight().to(x.dtype)
        if bias is None or bias.dtype == x.dtype:
            return torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias.to(x.dtype))

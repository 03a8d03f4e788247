"""Torch's fast paths compute whole layers in one operator, which would bypass the quantizers inside."""

import torch

from fastforward.nn.module import QuantizedModule


def fastpath_enabled(module: torch.nn.Module) -> bool:
    """`torch.backends.mha.get_fastpath_enabled`, but False once a quantizer in ``module`` or below it is active.

    Args:
        module: The module whose forward pass asks; generated code passes ``self``.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return False
    if not isinstance(module, QuantizedModule):
        return True
    return not module._stubs_live and next(module.quantizers(), None) is None

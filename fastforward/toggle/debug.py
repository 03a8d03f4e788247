"""What ``FF_AUTOQUANT_DEBUG=1`` prints: which modules were rewritten, which sites got a quantizer, and why not."""

import sys
from collections.abc import Iterable

import torch

from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import Quantizer
from fastforward.selection.scheme import Choice


def show_modules(root: torch.nn.Module, name: str) -> None:
    """Print, for each module below a new root, what it has become."""
    _print(f"root {name}")
    for path, module in root.named_modules():
        if isinstance(module, Quantizer):
            continue
        if not isinstance(module, QuantizedModule):
            _print(f"  {path or 'the root'}: {type(module).__name__} left as it is")
            continue
        made = "hand-written" if type(module).__module__.startswith("fastforward.") else "rewritten in memory"
        _print(f"  {path or 'the root'}: {type(module).__name__} ({made}), {len(module.own_quantizers())} sites")


def show_choices(choices: Iterable[Choice]) -> None:
    """Print, for each site, what the scheme puts there and the reason."""
    for choice in choices:
        kind = "float" if choice.quantizer is None else type(choice.quantizer).__name__
        _print(f"  {choice.site} ({choice.metadata.describe()}): {kind}, {choice.reason}")


def _print(line: str) -> None:
    print(f"fastforward: {line}", file=sys.stderr)

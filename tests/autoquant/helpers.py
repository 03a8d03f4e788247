"""What the tutorial's test imports: `autoquantize` and code formatting with the settings of these tests."""

import ast
from typing import Any

import torch

import fastforward as ff
from fastforward.autoquant.render import render


def autoquant_with_defaults(module: torch.nn.Module, **options: Any) -> str:
    """The text of the quantized classes of ``module``; nothing is written."""
    return ff.autoquantize(module, **options).code


def codeformat_with_defaults(code: str) -> str:
    """``code`` in the layout of generated code, whatever layout it had."""
    return render(ast.parse(code))

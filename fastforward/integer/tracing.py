"""Telling ``torch.export`` from ``torch.compile`` while tracing."""

import torch


def is_exporting() -> bool:
    """Whether the tracer at work is ``torch.export``.

    ``torch.compiler.is_exporting`` says so of every compiler that begins with Dynamo in torch 2.7 to 2.11 at least, and
    torch 2.6 does not have it; there only ``strict=False``, which :func:`fastforward.export` uses, can be told.
    """
    compiler = torch.compiler
    if hasattr(compiler, "_is_exporting_flag"):
        return bool(compiler._is_exporting_flag)
    return compiler.is_compiling() and not compiler.is_dynamo_compiling()

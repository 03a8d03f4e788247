"""What is at work while a program is traced: ``torch.export`` or ``torch.compile``, and what the latter may fuse."""

from typing import Any

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


def fuses(device: str) -> bool:
    """Whether layers on ``device`` are to say what they compute in operators that the compiler at work fuses."""
    return device == "cpu" and not is_exporting() and _fusing_is_ready()


def _fusing_is_ready() -> bool:
    """Whether oneDNN multiplies integers here; then Inductor is told to fuse what surrounds the products."""
    from fastforward.integer import onednn

    if not onednn.has_onednn():
        return False
    from torch._inductor import config

    before = config.pre_grad_custom_pass
    passes = list(before) if isinstance(before, list | tuple) else [before] if before is not None else []
    if not any(getattr(known, "fuses_integer_layers", False) for known in passes):
        config.pre_grad_custom_pass = _inductor_pass(passes)
    return True


# The mark of torch.compiler.assume_constant_result, whose import would load the compiler: this is not traced but run.
_fusing_is_ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _inductor_pass(passes: list[Any]) -> Any:
    """What Inductor is to run on every program before anything else: the ``passes`` that were there, then ours."""
    from fastforward_kernels import ops_chain
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    from fastforward.integer import compiled, compiled_own, compiled_products, compiled_sums

    class FuseIntegerLayers(CustomGraphPass):
        """Lets integer layers hand codes to each other."""

        fuses_integer_layers = True

        def __call__(self, graph: torch.fx.Graph) -> None:
            for other in passes:
                other(graph)
            compiled.fuse(graph)

        def uuid(self) -> Any:
            others = [getattr(other, "uuid", lambda: None)() for other in passes]
            if any(other is None for other in others):
                return None  # a pass that cannot say what it does: compiled programs are not kept
            files = (m.__file__ for m in (compiled, compiled_own, compiled_products, compiled_sums, ops_chain))
            return get_hash_for_files(tuple(files), str(others))

    return FuseIntegerLayers()

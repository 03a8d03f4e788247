"""What runs where: the integer chain of a model, and what this machine supports."""

import dataclasses
from collections.abc import Iterator

import torch

from fastforward.integer import onednn
from fastforward.integer.forms import REASON
from fastforward.integer.layer import IntegerLayer
from fastforward.nn.module import QuantizedModule

_NEVER_RAN = "not run yet"
_FLOAT_WINS = "float is faster here for the shapes measured"


@dataclasses.dataclass(frozen=True)
class Link:
    """One module of the chain.

    Attributes:
        path: Its name in the model.
        operator: What it computes.
        source: How its input arrives: ``"float32"`` (quantized here), ``"uint8"``, ``"int64"`` for indices.
        result: What it hands on: ``"float32"`` or ``"uint8"``.
        fused: Operators that its kernel took over.
        kernel: The kernel that ran last; empty for a float island.
        reason: Why a float island remains.
    """

    path: str
    operator: str
    source: str = ""
    result: str = ""
    fused: tuple[str, ...] = ()
    kernel: str = ""
    reason: str = ""

    @property
    def is_integer(self) -> bool:
        """Whether integers are multiplied or looked up here."""
        return not self.reason


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The links of a model, in its order of modules; ``str()`` of it is a table."""

    links: tuple[Link, ...]

    @property
    def integer(self) -> tuple[Link, ...]:
        """The links that run on integers."""
        return tuple(link for link in self.links if link.is_integer)

    @property
    def islands(self) -> tuple[Link, ...]:
        """The links that stay float or simulated."""
        return tuple(link for link in self.links if not link.is_integer)

    def __str__(self) -> str:
        rows = [("module", "operator", "in -> out", "kernel")]
        rows += [_row(link) for link in self.links]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        ]
        lines.append(f"{len(self.integer)} integer, {len(self.islands)} float or simulated")
        return "\n".join(line.rstrip() for line in lines)


def explain(model: torch.nn.Module) -> Explanation:
    """Describe how a converted model computes: operator, types in and out, kernel, and why a float island remains.

    Types and fused operators are those of the latest calls, so run the model once (or give ``example_inputs`` to
    ``convert``) before asking.
    """
    return Explanation(tuple(_links(model)))


def supported() -> dict[str, str]:
    """Which operators have integer kernels on this machine: operator to where and how they run."""
    cpu = "oneDNN uint8 x int8" if onednn.has_onednn() else "torch._int_mm"
    convolution = cpu if onednn.has_onednn() else "not on this CPU: its products of 8-bit integers saturate"
    table = {
        "linear": f"CPU: {cpu}; fuses relu, gelu, silu, tanh, hardtanh, hardswish, leaky_relu",
        "conv1d": f"CPU: {convolution}",
        "conv2d": f"CPU: {convolution}; fuses batch_norm and the activations of linear",
        "conv3d": f"CPU: {convolution}",
        "embedding": "CPU: int8 rows",
        "max_pool2d": "CPU: on codes",
        "flatten, reshape, view": "on codes",
        "add": "CPU: into the float result of linear and convolution",
    }
    if torch.cuda.is_available():
        table["linear (CUDA)"] = "Triton int8"
    return table


def _links(model: torch.nn.Module) -> Iterator[Link]:
    for path, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            yield _integer_link(path, module)
        elif getattr(module, "holds_integers", False):
            operator, source, result, kernel = module.chain_link()
            if kernel == "float":
                yield Link(path, operator, reason=_FLOAT_WINS)
            else:
                yield Link(path, operator, source, result, kernel=kernel)
        elif isinstance(module, QuantizedModule):
            yield from _island(path, module)


def _integer_link(path: str, layer: IntegerLayer) -> Link:
    record = layer.record
    name = type(layer).__name__.removeprefix("Integer").lower()
    if record.kernel == "float":
        return Link(path, name, reason=_FLOAT_WINS)
    ran = record.kernel or _NEVER_RAN
    return Link(path, name, record.source or _NEVER_RAN, record.result or _NEVER_RAN, record.fused, ran)


def _island(path: str, module: QuantizedModule) -> Iterator[Link]:
    active = [name for name, quantizer in module.own_quantizers().items() if not quantizer.is_stub()]
    if not active:
        return
    reason = getattr(module, REASON, None)
    if reason is None:
        shown = ", ".join(name.rpartition("_")[2] for name in active[:4])
        reason = (
            f"simulated: {len(active)} quantizers ({shown}{', ...' if len(active) > 4 else ''}) around float operators"
        )
    yield Link(path, type(module).__name__.removeprefix("Quantized").lower(), reason=reason)


def _row(link: Link) -> tuple[str, str, str, str]:
    if not link.is_integer:
        return link.path, link.operator, "float", link.reason
    operator = " + ".join((link.operator, *link.fused))
    return link.path, operator, f"{link.source} -> {link.result}", link.kernel

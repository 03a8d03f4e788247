"""What runs where: the integer chain of a model, and what this machine supports."""

import dataclasses
from collections.abc import Iterator

import torch

from fastforward.integer import onednn
from fastforward.integer.forms import FORMS, REASON
from fastforward.integer.layer import IntegerLayer
from fastforward.integer.own_weights import OPERATORS, operand_of, rounding_of
from fastforward.nn.module import QuantizedModule
from fastforward.nn.norm import QuantizedGroupNorm, QuantizedLayerNorm, QuantizedRMSNorm
from fastforward.nn.quantizer import Quantizer
from fastforward.selection.scheme import REASON as SCHEME_REASON

_NEVER_RAN = "not run yet"
_PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum", "multi_head_attention_forward")
_NORMS = (QuantizedLayerNorm, QuantizedRMSNorm, QuantizedGroupNorm)
# kernels/benchmarks/layers.py --neighbours measures it.
_ELEMENTWISE = "normalizes floats: from integers to integers it takes several times as long on CPUs"
FLOAT_WINS = "float is faster here for the shapes measured"


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
        kept: Why the float form of its weight is kept beside the integers, if it is.
    """

    path: str
    operator: str
    source: str = ""
    result: str = ""
    fused: tuple[str, ...] = ()
    kernel: str = ""
    reason: str = ""
    kept: str = ""

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
        "linear, matmul, mm, addmm with a parameter in a module's own code": f"CPU: {cpu}",
        "linear, dynamic activations": f"CPU: {cpu}, scales of the input per token or tensor",
        "linear, weights only": "CPU: int8 per channel; int4 in groups by torch's kernel in bfloat16",
        "conv1d": f"CPU: {convolution}",
        "conv2d": f"CPU: {convolution}; fuses batch_norm and the activations of linear",
        "conv3d": f"CPU: {convolution}",
        "conv_transpose1d, 2d, 3d": f"CPU: {convolution}",
        "lstm, gru, rnn": "CPU: products of gates as those of linear, step by step; float where torch's operator wins",
        "embedding": "CPU: int8 rows",
        "embedding_bag": "CPU: int8 rows, reduced in float",
        "max_pool2d": "CPU: on codes",
        "flatten, reshape, view": "on codes",
        "add": "CPU: into the result of linear and convolution",
        "layer_norm, rms_norm, softmax, mul": "float on CPUs, where integers are slower",
        "matmul of two activations": "float on CPUs: torch has no batched integer product there",
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
                yield Link(path, operator, reason=FLOAT_WINS)
            else:
                yield Link(path, operator, source, result, kernel=kernel)
        elif isinstance(module, QuantizedModule):
            yield from _island(path, module)


def _integer_link(path: str, layer: IntegerLayer, operator: str = "") -> Link:
    record = layer.record
    name = operator or type(layer).__name__.removeprefix("Integer").lower()
    if record.kernel == "float":
        return Link(path, name, reason=FLOAT_WINS)
    ran = record.kernel or _NEVER_RAN
    return Link(path, name, record.source or _NEVER_RAN, record.result or _NEVER_RAN, record.fused, ran)


def _island(path: str, module: QuantizedModule) -> Iterator[Link]:
    """What stays float of a module without integer form: a link per operator, none if it multiplies nothing."""
    quantizers = {name: q for name, q in module.own_quantizers().items() if isinstance(q, Quantizer)}
    active = [quantizer for quantizer in quantizers.values() if not quantizer.is_stub()]
    kind = _operator(module)
    if active and hasattr(module, REASON):
        yield Link(path, kind, reason=str(getattr(module, REASON)))
    elif active:
        links = list(_own_products(path, active, kind))
        yield from links
        operands: dict[str, dict[str, None]] = {}
        for quantizer in active:
            operator, argument = operand_of(quantizer, kind)
            operands.setdefault(operator, {})[argument] = None
        for operator, names in operands.items():
            if operator not in {link.operator for link in links}:
                yield Link(path, operator, reason=f"{', '.join(names)} rounded, computed in float: {_why(operator)}")
    elif isinstance(module, _NORMS):
        yield Link(path, kind, reason=_ELEMENTWISE)
    elif isinstance(module, tuple(FORMS)):
        yield Link(path, kind, reason=_why_no_quantizer(quantizers))


def _own_products(path: str, active: list[Quantizer], kind: str) -> Iterator[Link]:
    """The products of a module's own code with parameters that give integers."""
    for quantizer in active:
        rounding = rounding_of(quantizer)
        if rounding is None:
            continue
        operator, _ = operand_of(quantizer, kind)
        rows = quantizer.parameter
        name = f"{path}.{rows.name}" if path and rows is not None else path if rows is None else rows.name
        layers = rounding.layers()
        for layer in layers:
            yield dataclasses.replace(_integer_link(name, layer, operator), kept=rounding.kept)
        if not layers and rounding.weight is not None:
            yield Link(name, operator, reason="its weight is rounded, its input is on no static 8-bit grid")
        elif not layers:
            yield Link(name, operator, _NEVER_RAN, _NEVER_RAN, kernel=_NEVER_RAN)


def _operator(module: QuantizedModule) -> str:
    return type(module).__name__.removeprefix("Quantized").lower()


def _why(operator: str) -> str:
    if operator in _PRODUCTS:
        return "torch has no batched integer product on CPUs, and one product per matrix is slower"
    if operator in supported() or operator in OPERATORS:
        return (
            f"{operator} is called by the module's own code; there products of an input on one static 8-bit grid and a "
            "matrix that is a parameter become integer, others in layers of torch.nn alone"
        )
    return f"{operator} has no integer kernel"


def _why_no_quantizer(quantizers: dict[str, Quantizer]) -> str:
    """The scheme's words about the first operand that it left alone."""
    reasons = [str(reason) for q in quantizers.values() if (reason := getattr(q, SCHEME_REASON, None)) is not None]
    told = [reason for reason in reasons if not reason.startswith(("output of", "bias of"))]
    return told[0] if told else "nothing of it is quantized"


def _row(link: Link) -> tuple[str, str, str, str]:
    if not link.is_integer:
        return link.path, link.operator, "float", link.reason
    operator = " + ".join((link.operator, *link.fused))
    kernel = f"{link.kernel}; floats kept: {link.kept}" if link.kept else link.kernel
    return link.path, operator, f"{link.source} -> {link.result}", kernel

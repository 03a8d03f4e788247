"""The dataflow of a model as a run shows it: which stub governs which operand, and where values come from and go to.

In comes a model with stubs and something that runs it; out comes a :class:`Flow`. Schemes, smoothing, the removal of
double quantization and coverage all read it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastforward.calibration.trace import Layout
from fastforward.nn.quantizer import Quantizer

if TYPE_CHECKING:
    from fastforward.selection.roles import Role

OperandKind = Literal["weight", "activation"]


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of an operator, at one site.

    Attributes:
        argument: Its name in the operator's schema.
        kind: ``"weight"`` if it comes from a parameter alone, otherwise ``"activation"``.
        quantizer: Full name of the last quantizer its value passed, or else of the last stub, with only data movement
            since; ``None`` if there is no such place.
        active: Whether that one is a quantizer rather than a stub.
        channel_axis: Axis of a weight that becomes the output's channels, in the tensor that the quantizer sees.
        shape: Shape of that tensor, for a weight.
        producer: The site that computed the value; ``None`` for inputs and parameters.
        direct: Whether the value is as the producer made it: no movement has changed where its elements are.
    """

    argument: str
    kind: OperandKind
    quantizer: str | None
    active: bool = False
    channel_axis: int | None = None
    shape: tuple[int, ...] | None = None
    producer: int | None = None
    direct: bool = False


@dataclasses.dataclass
class Site:
    """One operator at one place of the program, over all calls recorded.

    Attributes:
        number: Its position in ``Flow.sites``.
        operator: Name in the operator table.
        module: Path of the module that ran it.
        file: The user's source file; ``line`` likewise.
        operands: The operands that multiply, or that a table of vectors is made of.
        multiplies: Whether it multiplies and accumulates.
        macs: Multiply-accumulates, over all calls.
        calls: How often it ran.
        integer: Whether an integer layer ran it.
    """

    number: int
    operator: str
    module: str
    file: str | None
    line: int | None
    operands: tuple[Operand, ...] = ()
    multiplies: bool = False
    macs: int = 0
    calls: int = 0
    integer: bool = False

    @property
    def place(self) -> str:
        """File and line in words."""
        return f"{self.file}:{self.line}" if self.file else "unknown source"


@dataclasses.dataclass
class Flow:
    """What a run has shown.

    Attributes:
        sites: Every floating operator that ran, in order of its first call.
        reached: Full names of the stubs and quantizers that saw a floating tensor.
        shared: Groups of quantizers that see one and the same value on every call, in all layers that multiply it.
        consumers: For each site, the sites that use its result, movements of data in between; ``OUTPUT`` stands for
            the model's own output.
        outside: Sites whose result no stub sees: operators that stay float whatever a scheme says.
        parameters: Ids of the parameters that the run read.
        layouts: For producer and consumer, how the axes of the value lay when it was used, in all calls.
        moved: The pairs of producer and consumer between which, in some call, elements changed their place.
    """

    sites: list[Site] = dataclasses.field(default_factory=list)
    reached: frozenset[str] = frozenset()
    shared: list[frozenset[str]] = dataclasses.field(default_factory=list)
    consumers: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    outside: list[Site] = dataclasses.field(default_factory=list)
    parameters: frozenset[int] = frozenset()
    layouts: dict[tuple[int, int], frozenset[Layout]] = dataclasses.field(default_factory=dict)
    moved: frozenset[tuple[int, int]] = frozenset()

    @property
    def multiplying(self) -> list[Site]:
        """The sites that multiply and accumulate."""
        return [site for site in self.sites if site.multiplies]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the run."""
        return sum(site.macs for site in self.sites)

    def governed(self) -> dict[str, list[tuple[Site, Operand]]]:
        """For each stub or quantizer that governs operands: those, with their sites."""
        found: dict[str, list[tuple[Site, Operand]]] = {}
        for site in self.sites:
            for operand in site.operands:
                if operand.quantizer is not None:
                    found.setdefault(operand.quantizer, []).append((site, operand))
        return found

    def governing(self) -> "dict[str, Role]":
        """The role of each stub that governs an operand; what a scheme's ``apply`` takes.

        A stub whose value serves as an activation anywhere is an activation; a weight used with different channel axes
        has none.
        """
        from fastforward.selection.roles import Role

        roles = {}
        for name, uses in self.governed().items():
            site, operand = next(((s, o) for s, o in uses if o.kind == "activation"), uses[0])
            axes = {o.channel_axis for _, o in uses}
            axis = operand.channel_axis if operand.kind == "weight" and len(axes) == 1 else None
            roles[name] = Role(operand.kind, site.operator, operand.argument, axis, operand.shape)
        return roles

    def edges(self) -> list[tuple[Site, Site]]:
        """Producer and consumer of every value that goes from one operator to another."""
        return [
            (self.sites[producer], self.sites[consumer])
            for producer, consumers in sorted(self.consumers.items())
            for consumer in sorted(consumers)
            if consumer != OUTPUT
        ]


OUTPUT = -1
"""Stands for the model's output among the consumers of a site."""


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run compiled wrappers as plain Python for the block: recorders and observers act on every call."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quantizer_names(model: torch.nn.Module) -> dict[int, str]:
    """Full name of every stub and quantizer, by ``id``."""
    return {id(module): name for name, module in model.named_modules() if isinstance(module, Quantizer)}


@contextlib.contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, without gradients; afterwards every module has the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def passing_through(model: torch.nn.Module) -> Iterator[None]:
    """Within the block active quantizers pass values on unrounded, calibrated or not, as another object."""
    active = [module for module in model.modules() if isinstance(module, Quantizer) and not module.is_stub()]
    handles = [quantizer.register_override(_another_object) for quantizer in active]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _another_object(quantizer: Quantizer, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    alias: torch.Tensor = torch.ops.aten.alias(args[0])
    return alias


def record_flow(model: torch.nn.Module, run: Any, **options: Any) -> Flow:
    """Run ``run()`` once and return what happened.

    Args:
        model: A model whose classes were swapped; stubs or quantizers, as they are.
        run: A function without arguments that runs the model, and returns what it returned.
        options: See :class:`fastforward.calibration.recorder.FlowRecorder`.
    """
    from fastforward.calibration.recorder import FlowRecorder

    recorder = FlowRecorder(model, **options)
    with recorder:
        recorder.output(run())
    return recorder.flow()

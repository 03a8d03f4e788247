"""FlowRecorder: watches a run and yields its :class:`~fastforward.calibration.flow.Flow`.

Three things report. A torch-function mode sees every operator; stubs and quantizers report the tensors that pass them;
module hooks say whose code is running. Tensors are followed by identity and held weakly.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fastforward.autoquant.optable import Operator, OperatorTable, default_table
from fastforward.calibration.flow import OUTPUT, Flow, Operand, OperandKind, Site, quantizer_names
from fastforward.calibration.frames import scopes, user_place
from fastforward.calibration.macs import multiply_accumulates
from fastforward.calibration.torch_calls import bind, find_operator, function_name, functionals_open, moves, pads
from fastforward.calibration.trace import Layout, Trace, fresh, is_parameter, moved, passed, tensors_in
from fastforward.nn.module import stubs_live
from fastforward.nn.quantizer import Quantizer, Recorder, recording
from fastforward.nn.rewritten import RewrittenModule

# `W @ x`: rows of the first factor become the output's channels, as columns of the second do in the table.
_ROWS_OF_FIRST = {"matmul": "input", "mm": "input", "bmm": "input", "addmm": "mat1", "baddbmm": "batch1"}
_QUERIES = frozenset({"is_same_size", "data_ptr", "storage_offset", "grad", "_version", "__set__", "backward"})


class Listener(Protocol):
    """Is told of every call of a multiplying operator."""

    def operator_ran(
        self, site: Site, function: Any, operator: Operator, arguments: dict[str, Any], traces: Mapping[str, Trace]
    ) -> None: ...


class FlowRecorder(TorchFunctionMode):
    """Records while it is entered; afterwards ``flow()`` says what happened.

    Args:
        model: The model that will run.
        table: The operator table; the bundled one by default.
        integer: Says of a module which operator it runs on integers; what happens inside is then not looked at.
        listener: Is told of the operands of every multiplying operator.
        live: Call stubs too; without it only active quantizers report.
        also: Another recorder of stubs, told of the same tensors.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        table: OperatorTable | None = None,
        integer: Callable[[torch.nn.Module], str | None] | None = None,
        listener: Listener | None = None,
        live: bool = True,
        also: Recorder | None = None,
    ) -> None:
        super().__init__()
        self._also = also
        self._model, self._table, self._listener, self._live = model, table or default_table(), listener, live
        self._integer = integer or (lambda module: None)
        self._paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
        self._stack: list[torch.nn.Module] = []
        self._hidden = 0
        self._traces: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._sites: dict[tuple[Any, ...], Site] = {}
        self._operands: dict[int, tuple[tuple[Operand, Quantizer | None], ...]] = {}
        self._consumers: dict[int, set[int]] = {}
        self._layouts: dict[tuple[int, int], set[Layout]] = {}
        self._moved: set[tuple[int, int]] = set()
        self._values: dict[int, set[int]] = {}
        self._quantizers: dict[int, Quantizer] = {}
        self._unsited: dict[int, int] = {}
        self._parameters: set[int] = set()
        self._exit = contextlib.ExitStack()

    # ------------------------------------------------------------------ life
    def __enter__(self) -> "FlowRecorder":
        with contextlib.ExitStack() as stack:
            if self._live:
                stack.enter_context(stubs_live(self._model))
            stack.enter_context(recording(self))
            stack.enter_context(functionals_open())
            before = torch.nn.modules.module.register_module_forward_pre_hook(self._enter_module)
            stack.callback(before.remove)
            after = torch.nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True)
            stack.callback(after.remove)
            self._exit = stack.pop_all()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        self._exit.close()
        self._stack.clear()
        self._hidden = 0

    def output(self, result: Any) -> None:
        """Say what the model returned: its tensors are used outside."""
        for tensor in tensors_in(result):
            producer = self._trace(tensor).producer
            if producer is not None:
                self._consumers.setdefault(producer, set()).add(OUTPUT)

    # ------------------------------------------------------------------ modules
    def _enter_module(self, module: torch.nn.Module, args: Any) -> None:
        self._stack.append(module)
        self._hidden += self._opaque(module)

    def _leave_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._stack or self._stack[-1] is not module:
            return
        self._stack.pop()
        self._hidden -= self._opaque(module)
        operator = self._integer(module)
        if operator is not None and self._hidden == 0:
            self._integer_ran(module, operator, args, output)

    def _opaque(self, module: torch.nn.Module) -> int:
        return int(isinstance(module, Quantizer) or self._integer(module) is not None)

    def _integer_ran(self, module: torch.nn.Module, operator: str, args: Any, output: Any) -> None:
        site = self._site(operator, self._module_path(module), (), ())
        site.integer, site.multiplies = True, operator not in ("embedding", "embedding_bag")
        site.calls += 1
        out = next(iter(tensors_in(output)), None)
        own = getattr(module, "multiplications", None)
        if out is not None and own is not None:
            site.macs += own(next(iter(tensors_in(args))), out)
        elif out is not None and site.multiplies:
            shape = getattr(module, "weight_shape", None) or (0, getattr(module, "in_features", 0))
            shape = shape() if callable(shape) else shape
            site.macs += out.numel() * math.prod(shape[1:])
        self._consume(site, tensors_in(args))
        for tensor in tensors_in(output):
            self._traces[tensor] = fresh(tensor, producer=site.number)

    def _module_path(self, module: torch.nn.Module | None = None) -> str:
        if module is not None:
            return self._paths.get(id(module), "")
        paths = self._paths
        return next((paths[id(module)] for module in reversed(self._stack) if id(module) in paths), "")

    # ------------------------------------------------------------------ stubs and quantizers
    def record(self, quantizer: Quantizer, tensor_in: Tensor, tensor_out: Tensor) -> None:
        """Note that a tensor passed ``quantizer``."""
        if self._also is not None:
            self._also.record(quantizer, tensor_in, tensor_out)
        trace = self._trace(tensor_in)
        self._quantizers[id(quantizer)] = quantizer
        self._unsited.pop(trace.root, None)
        same = tensor_out is tensor_in
        self._traces[tensor_out] = passed(trace, quantizer, self._context(), tensor_out, same=same)

    def _context(self) -> object:
        """Whose code is calling a quantizer: a hand-written module, or else a rewritten function's scope."""
        owner = next((module for module in reversed(self._stack) if not isinstance(module, Quantizer)), None)
        if owner is not None and not isinstance(owner, RewrittenModule):
            return owner
        return next(scopes(), owner)

    def _alive(self) -> Callable[[object], bool]:
        running: set[int] = set()

        def alive(context: object) -> bool:
            if not running:
                running.update(id(scope) for scope in scopes())
                running.update(id(module) for module in self._stack)
            return id(context) in running

        return alive

    def _trace(self, tensor: Tensor) -> Trace:
        known: Trace | None = self._traces.get(tensor)
        if known is None:
            known = self._traces[tensor] = fresh(tensor, parameter=is_parameter(tensor))
            if known.parameter:
                self._parameters.add(id(tensor))
        return known

    # ------------------------------------------------------------------ operators
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._hidden:
            return func(*args, **kwargs)
        name = function_name(func)
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        before = self._trace(args[0]) if writes and args and isinstance(args[0], Tensor) else None
        result = func(*args, **kwargs)
        outs = [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]
        if name == "__setitem__" and isinstance(args[0], Tensor) and args[0].is_floating_point():
            outs = [args[0]]
        if outs and name not in _QUERIES:
            self._note(func, name, args, kwargs, outs, before)
        return result

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor], before: Trace | None) -> None:
        operator = find_operator(self._table, func, name)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and before is None and moves(operator, name, args, kwargs):
            trace = self._trace(source)
            for out in outs:
                if out is not source:
                    self._traces[out] = moved(trace, name, args, kwargs, source, out)
            return
        inputs = [tensor for tensor in tensors_in([args, kwargs]) if tensor.is_floating_point()]
        if not inputs or (operator is not None and operator.kind == "move" and self._joined(inputs, outs)):
            return
        self._computed(func, operator, name, args, kwargs, inputs, outs)

    def _joined(self, inputs: list[Tensor], outs: list[Tensor]) -> bool:
        """Whether a movement of several tensors (stack, broadcast) took all of them from one quantizer."""
        alive = self._alive()
        traces = [self._trace(tensor) for tensor in inputs]
        sources = [trace.governing(alive) for trace in traces]
        if sources[0] is None or any(p is None or p.quantizer is not sources[0].quantizer for p in sources):
            return False
        for out in outs:
            self._traces[out] = moved(traces[0], "stack", (), {}, inputs[0], out)
        return True

    def _computed(
        self, func: Any, operator: Operator | None, name: str, args: Any, kwargs: Any,
        inputs: list[Tensor], outs: list[Tensor],
    ) -> None:  # fmt: skip
        arguments = bind(operator, func, name, args, kwargs) if operator is not None else {}
        operands, traces = self._operands_of(operator, arguments)
        label = operator.identifier if operator is not None else name
        site = self._site(label, self._module_path(), operands, tuple(id(q) for _, q in operands))
        site.calls += 1
        if operator is not None and operator.multiplied:
            site.multiplies = True
            site.macs += multiply_accumulates(operator.identifier, arguments, outs)
            if self._listener is not None:
                self._listener.operator_ran(site, func, operator, arguments, traces)
        from_parameters = all(self._trace(tensor).parameter for tensor in inputs)
        self._consume(site, inputs)
        before = self._trace(inputs[0])
        if before.passages and pads(name, args, kwargs):
            for out in outs:
                padded = moved(before, name, args, kwargs, inputs[0], out)
                own = fresh(out, parameter=padded.parameter, producer=site.number)
                self._traces[out] = dataclasses.replace(own, passages=padded.passages)
            return
        for out in outs:
            trace = self._traces[out] = fresh(out, parameter=from_parameters, producer=site.number)
            if operator is None or operator.kind != "move":  # the values that a movement joins have sites of their own
                self._unsited[trace.root] = site.number

    def _consume(self, site: Site, inputs: Iterable[Tensor]) -> None:
        for tensor in inputs:
            trace = self._trace(tensor)
            if trace.producer is not None and trace.producer != site.number:
                self._consumers.setdefault(trace.producer, set()).add(site.number)
                edge = trace.producer, site.number
                self._layouts.setdefault(edge, set()).add(trace.layout)
                if trace.value != trace.root:
                    self._moved.add(edge)

    def _operands_of(
        self, operator: Operator | None, arguments: Mapping[str, Any]
    ) -> tuple[tuple[tuple[Operand, Quantizer | None], ...], dict[str, Trace]]:
        found: list[tuple[Operand, Quantizer | None]] = []
        traces: dict[str, Trace] = {}
        alive = self._alive()
        names = dict.fromkeys((*operator.multiplied, *operator.axes)) if operator is not None else {}
        for argument in names:
            for tensor in tensors_in(arguments.get(argument)):
                if tensor.is_floating_point():
                    traces.setdefault(argument, self._trace(tensor))
                    found.append(self._operand(operator, argument, tensor, alive))
        return tuple(found), traces

    def _operand(
        self, operator: Any, argument: str, tensor: Tensor, alive: Callable[[object], bool]
    ) -> tuple[Operand, Quantizer | None]:
        trace = self._trace(tensor)
        axis = operator.weight_axis(argument)
        if axis is None and _ROWS_OF_FIRST.get(operator.identifier) == argument and tensor.dim() >= 2:
            axis = -2
        kind: OperandKind = "weight" if trace.parameter and axis is not None else "activation"
        passage = trace.governing(alive)
        direct = trace.value == trace.root
        if passage is None:
            return Operand(argument, kind, None, producer=trace.producer, direct=direct), None
        quantizer = passage.quantizer
        active = not quantizer.is_stub()
        if kind == "activation":
            self._values.setdefault(id(quantizer), set()).add(trace.value)
            return Operand(argument, kind, None, active, producer=trace.producer, direct=direct), quantizer
        followed = passage.axes[axis] if axis is not None and tensor.dim() else -1
        channel_axis = None if followed < 0 else followed
        return Operand(argument, kind, None, active, channel_axis, passage.shape, trace.producer, direct), quantizer

    def _site(self, operator: str, module: str, operands: Any, quantizers: tuple[int, ...]) -> Site:
        file, line = user_place()
        key = operator, module, file, line, quantizers
        known = self._sites.get(key)
        if known is None:
            known = self._sites[key] = Site(len(self._sites), operator, module, file, line)
            self._operands[known.number] = operands
        return known

    # ------------------------------------------------------------------ result
    def flow(self) -> Flow:
        """What was recorded; names of stubs that appeared during the run included."""
        names = quantizer_names(self._model)
        sites = list(self._sites.values())
        for site in sites:
            site.operands = tuple(
                dataclasses.replace(operand, quantizer=names.get(id(quantizer)))
                for operand, quantizer in self._operands[site.number]
            )
        outside = sorted(set(self._unsited.values()))
        return Flow(
            sites,
            frozenset(names[key] for key in self._quantizers if key in names),
            self._shared(names),
            {producer: frozenset(used) for producer, used in self._consumers.items()},
            [sites[number] for number in outside],
            frozenset(self._parameters),
            {edge: frozenset(layouts) for edge, layouts in self._layouts.items()},
            frozenset(self._moved),
        )

    def _shared(self, names: Mapping[int, str]) -> list[frozenset[str]]:
        groups: dict[frozenset[int], set[str]] = {}
        for quantizer, values in self._values.items():
            if quantizer in names:
                groups.setdefault(frozenset(values), set()).add(names[quantizer])
        return [frozenset(group) for group in groups.values() if len(group) > 1]

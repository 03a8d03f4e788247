"""Converted models under ``torch.compile``: what the compiled program computes is what the integer layers compute eagerly.

Two backends: the pass that lets integer layers hand codes to each other, its program run operator by operator; and Inductor,
which runs that pass and compiles what it leaves. The first takes seconds, and all rules of the pass hold for it: the inputs of
the zoo are so small that otherwise products and attention would be left to the compiler.
"""

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._inductor.config

import fastforward as ff
from fastforward.integer import compiled, onednn
from tests.zoo.compiled import quickly_quantized, why_not_compiled
from tests.zoo.entry import Entry
from tests.zoo.integers import EQUAL, RUNS, floating_tensors, sqnr
from tests.zoo.stubs import run
from tests.zoo.values import tensors

TOLERANCE = 2.0
"""Decibels by which a compiled program may be further from float than eager integers: it adds residuals in floats or not."""
COMPILED_RUNS = 2


@dataclass
class CompiledIntegers:
    """What was found for one model.

    Attributes:
        problems: Where the compiled program differs from the eager model by more than rounding.
        whole: Whether the program is one graph, as that of the float model.
        operators: The operators of ours in the program, and how often.
        same: The least over the outputs, of compiled against eager integers, in decibels.
    """

    problems: list[str] = field(default_factory=list)
    whole: bool = True
    operators: dict[str, int] = field(default_factory=dict)
    same: float = float("inf")


def fusing(programs: list[torch.fx.GraphModule]) -> Callable[[torch.fx.GraphModule, Any], Any]:
    """A backend that runs the pass, keeps the program and leaves it to torch to run."""

    def backend(program: torch.fx.GraphModule, _: Any) -> Any:
        compiled.fuse(program.graph)
        program.graph.lint()
        program.recompile()
        programs.append(program)
        return program

    return backend


def check(entry: Entry, *, inductor: bool) -> CompiledIntegers:
    """Convert, run eagerly, compile, run again."""
    data = entry.arguments()
    exact = run(entry.make(), data).outputs
    model = ff.convert(quickly_quantized(entry, data))
    eager = [run(model, data).outputs for _ in range(RUNS)][-1]
    programs: list[torch.fx.GraphModule] = []
    result = CompiledIntegers(whole=not why_not_compiled(entry, data, exact))
    with _as_inductor_runs_here() if inductor else _all_rules():
        backend: Any = "inductor" if inductor else fusing(programs)
        program = torch.compile(model, fullgraph=result.whole, backend=backend)
        for number in range(COMPILED_RUNS):
            outputs = run(program, data).outputs  # type: ignore[arg-type]
            _compare(result, f"run {number}", (exact, eager, outputs))
    result.operators = dict(_ours(programs))
    return result


@contextlib.contextmanager
def _as_inductor_runs_here() -> Iterator[None]:
    """Random numbers as in eager mode, and nothing from an earlier compilation."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True, force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@contextlib.contextmanager
def _all_rules() -> Iterator[None]:
    """The pass's rules for many rows and many scores hold for few as well, in the type in which eager mode takes few."""
    few = dict.fromkeys(compiled._FEW_SCORES, 0)
    changed = [
        (onednn, "FEW_ROWS", 0),
        (compiled, "_FEW_SCORES", few),
        (compiled, "multiplies_bfloat16", lambda: False),
    ]
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        for module, name, value in changed:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
    torch._dynamo.reset()


def _compare(result: CompiledIntegers, when: str, outputs: tuple[Any, Any, Any]) -> None:
    kinds = [{name: (t.dtype, tuple(t.shape)) for name, t in tensors(value)} for value in outputs[1:]]
    if kinds[0] != kinds[1]:
        differing = [
            f"{name} {kinds[1].get(name)}, eagerly {kind}"
            for name, kind in kinds[0].items()
            if kinds[1].get(name) != kind
        ]
        result.problems.append(f"{when}: {differing or sorted(kinds[1].keys() - kinds[0].keys())}"[:300])
        return
    exact, eager, actual = map(floating_tensors, outputs)
    for name, value in actual.items():
        same = sqnr(eager[name], value)
        result.same = min(result.same, same)
        lost, before = sqnr(exact[name], value), sqnr(exact[name], eager[name])
        if same < EQUAL and lost < before - TOLERANCE:
            what = f"{lost:.1f} dB from float, {before:.1f} dB eagerly"
            result.problems.append(f"{when}: {name} is {what}, {same:.1f} dB from the eager integers")


def _ours(programs: list[torch.fx.GraphModule]) -> collections.Counter[str]:
    """Operators of integer products and how often programs call them."""
    names = (str(node.target) for program in programs for node in program.graph.nodes if node.op == "call_function")
    return collections.Counter(name for name in names if name.startswith(("fastforward", "onednn")))

"""`show_source`: the original source of a class or function and its quantized form, side by side."""

import inspect
import itertools
import sys
import textwrap
import types
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import torch

from fastforward.autoquant.bind import bound_engine, engine_for
from fastforward.autoquant.classtext import ModuleText
from fastforward.autoquant.optable import OperatorTable
from fastforward.autoquant.recompile import Engine
from fastforward.autoquant.render import render

if TYPE_CHECKING:
    from fastforward.autoquant.patterns import PatternRule

_GUTTER = " | "


def show_source(
    obj: Any,
    *,
    operator_table: OperatorTable | None = None,
    replacement_patterns: Sequence["PatternRule"] = (),
    use_type_inference: bool = True,
    file: TextIO | None = None,
) -> None:
    """Print the source of a module class or function on the left and its quantized form on the right.

    Options bound to ``obj`` by ``@ff.quantizable`` or the import hook are used unless others are given here.

    Args:
        obj: A subclass of ``torch.nn.Module``, an instance of one, or a Python function.
        operator_table: Operators with quantized forms.
        replacement_patterns: Applied to the source first.
        use_type_inference: Whether annotations and the like decide what can be a tensor.
        file: Where to print; standard output if not given.

    Raises:
        TypeError: ``obj`` is none of these.
        AutoquantError: It has no source or cannot be rendered.
    """
    target = type(obj) if isinstance(obj, torch.nn.Module) else obj
    if not (
        isinstance(target, types.FunctionType) or (isinstance(target, type) and issubclass(target, torch.nn.Module))
    ):
        msg = f"show_source: expected a torch.nn.Module class or a function, got {type(target).__name__}"
        raise TypeError(msg)
    given = operator_table is not None or len(replacement_patterns) > 0
    engine = engine_for(operator_table, replacement_patterns) if given else bound_engine(target) or engine_for()
    rewritten = rewritten_source(target, engine, use_type_inference)
    original = textwrap.dedent(inspect.getsource(target))
    print(side_by_side(original, rewritten), file=file or sys.stdout)


def rewritten_source(
    target: type[torch.nn.Module] | types.FunctionType, engine: Engine, use_type_inference: bool = True
) -> str:
    """The quantized form of a class or function as text, as `autoquantize` writes it.

    Raises:
        AutoquantError: It cannot be rendered.
    """
    text = ModuleText(engine, use_type_inference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(target, type):
            text.add_class(target)
        else:
            text.add_function(target)
    return render(text.tree())


def side_by_side(left: str, right: str) -> str:
    r"""Two texts in two columns.

    >>> print(side_by_side("a\nbb", "c"))
    a  | c
    bb |
    """
    rows = list(itertools.zip_longest(left.rstrip().splitlines(), right.rstrip().splitlines(), fillvalue=""))
    width = max((len(row[0]) for row in rows), default=0)
    return "\n".join(f"{one:<{width}}{_GUTTER}{other}".rstrip() for one, other in rows)

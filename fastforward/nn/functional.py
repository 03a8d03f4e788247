"""Every operator of the operator table as a function: torch's arguments, plus keyword ``output_quantizer``.

The functions are made from the table when a name is first used. With tensors on quantizers' grids they compute in
float; with `QuantizedTensor` operands torch's dispatch runs the integer kernel. Operands that are no tensors pass
through the plain Python operator, so ``add([1], [2])`` is ``[1, 2]``.

    >>> import torch, fastforward as ff
    >>> ff.nn.functional.add(torch.ones(2), 1, output_quantizer=ff.nn.QuantizerStub())
    tensor([2., 2.])
"""

from collections.abc import Callable
from typing import Any

from fastforward.nn import operator_functions


def __getattr__(name: str) -> Callable[..., Any]:
    row = None if name.startswith("_") else operator_functions.rows().get(name)
    if row is None:
        msg = f"module {__name__!r} has no attribute {name!r}: the operator table has no row of that name"
        raise AttributeError(msg)
    function = operator_functions.build(row)
    function.__module__ = __name__
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return [*operator_functions.rows()]

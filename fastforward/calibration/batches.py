"""Calibration data: what the user gives, as a list of calls of the model."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fastforward.exceptions import CalibrationError


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a model: ``model(*args, **kwargs)``.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> import fastforward as ff
        >>> ff.Call((1, 2), {"mode": "fast"}).kwargs
        {'mode': 'fast'}
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Data = Iterable[Any] | Callable[..., Any]


class Batches:
    """Calibration data that can be run through a model several times.

    Args:
        data: An iterable of batches, or a function that runs the model (with the model as argument, if it takes one).
            A batch is a tensor, a tuple or list (positional), a mapping (keyword), or a :class:`Call`. What can be
            iterated over only once is kept as a list.

    Raises:
        CalibrationError: There are no batches.
        TypeError: ``data`` is neither, or a batch is none of these.
    """

    def __init__(self, data: Data) -> None:
        self._function = data if callable(data) and not isinstance(data, Iterable) else None
        self._calls = [] if self._function is not None else _calls(data)

    def __len__(self) -> int:
        return 1 if self._function is not None else len(self._calls)

    def run(
        self, model: torch.nn.Module, label: str, *, progress: bool, each: Callable[[Any], None] | None = None
    ) -> None:
        """Run all data through ``model``; ``each`` gets what every call returned."""
        if self._function is not None:
            result = self._function(model) if _takes_model(self._function) else self._function()
            if each is not None:
                each(result)
            return
        for call in tqdm(self._calls, desc=label, disable=not progress, leave=False):
            result = model(*call.args, **call.kwargs)
            if each is not None:
                each(result)

    def run_first(self, model: torch.nn.Module) -> Any:
        """Run the first batch, or the function, and return what it returned."""
        if self._function is not None:
            return self._function(model) if _takes_model(self._function) else self._function()
        return model(*self._calls[0].args, **self._calls[0].kwargs)

    @property
    def first(self) -> Call | None:
        """The first call; ``None`` if a function runs the model."""
        return self._calls[0] if self._calls else None


def as_call(batch: Any) -> Call:
    """Return a batch as a call of the model."""
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, torch.Tensor):
        return Call((batch,))
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    if isinstance(batch, (tuple, list)):
        return Call(tuple(batch))
    msg = (
        f"a calibration batch must be a tensor, a tuple (positional arguments), a mapping (keyword arguments) or "
        f"ff.Call(args, kwargs), got {type(batch).__name__}"
    )
    raise TypeError(msg)


def _calls(data: Any) -> list[Call]:
    if isinstance(data, (torch.Tensor, str, Mapping, Call)) or not isinstance(data, Iterable):
        hint = "wrap a single batch in a list: [batch]" if isinstance(data, (torch.Tensor, Mapping, Call)) else ""
        msg = (
            f"data must be an iterable of batches or a function that runs the model, got {type(data).__name__}; {hint}"
        )
        raise TypeError(msg.removesuffix("; "))
    calls = [as_call(batch) for batch in data]
    if not calls:
        msg = "there is no calibration data: 'data' holds no batches"
        raise CalibrationError(msg)
    return calls


def _takes_model(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError):
        return False
    return True

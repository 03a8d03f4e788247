"""Floating operators outside any site, found by a torch-function mode and listed by file and line.

An operator that computes floats from floats is *at a site* if a quantizer could act on it: every floating result passes a
stub before anything else computes with it (data movement and changes in place in between do not count), or every floating
operand has passed one since it was computed. What only moves data, and what makes tensors from no tensor, is no operator here.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

import fastforward as ff
from fastforward.autoquant.optable import default_table
from fastforward.calibration.torch_calls import find_operator
from fastforward.nn.module import stubs_live
from fastforward.nn.quantizer import Quantizer, recording
from tests.zoo.entry import Entry
from tests.zoo.open_functionals import open_functionals
from tests.zoo.values import tensors

_MOVES = frozenset(
    "view reshape permute transpose contiguous expand expand_as flatten unflatten squeeze unsqueeze detach clone to type float half "
    "double bfloat16 type_as chunk split unbind narrow select movedim swapaxes swapdims moveaxis t mT T H roll flip rot90 tile repeat "
    "repeat_interleave index_select gather take take_along_dim masked_select diagonal unfold as_strided view_as reshape_as alias "
    "__getitem__ getitem cpu cuda requires_grad_ retain_grad data stack cat concat concatenate hstack vstack dstack tensor_split "
    "meshgrid broadcast_to broadcast_tensors split_with_sizes hsplit vsplit dsplit atleast_1d atleast_2d atleast_3d numpy grad real "
    "imag view_as_real view_as_complex pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle zeros_like ones_like "
    "full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty new_tensor item tolist size dim "
    "fill_ zero_ uniform_ normal_ copy_ __setitem__ set_ bernoulli_ sort topk adjoint refine_names rename squeeze_ unsqueeze_ "
    "transpose_ _chunk_cat pack_padded_sequence _pack_padded_sequence resolve_conj resolve_neg is_floating_point".split()
)
_DROPOUT = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
)


@dataclass(eq=False)
class Computed:
    """One execution of an operator: where, and whether a quantizer could act on it.

    ``later`` is the operator that changed the result in place.
    """

    place: str
    name: str
    at_site: bool
    later: "Computed | None" = None

    def is_at_site(self) -> bool:
        """Whether a stub saw the result, maybe after changes in place."""
        return self.at_site or (self.later is not None and self.later.is_at_site())


@dataclass
class Report:
    """What a run showed.

    Attributes:
        total: Floating operators that ran.
        outside: Those outside any site, by ``file:line operator``.
        unknown: Those without a row in the operator table, likewise.
    """

    total: int = 0
    outside: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Part of the operators that is outside."""
        return sum(self.outside.values()) / max(self.total, 1)


class SiteMode(TorchFunctionMode):
    """Follows every floating tensor from the operator that computed it to the stub that sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[Computed] = []
        self.unknown: Counter[str] = Counter()
        self._origin: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._governed: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def record(self, quantizer: Quantizer, tensor_in: Tensor, tensor_out: Tensor) -> Tensor:
        """A stub saw ``tensor_in``: the operator that computed it is at a site."""
        origin = self._origin.get(tensor_in)
        if origin is not None:
            origin.at_site = True
        self._governed[tensor_in] = self._governed[tensor_out] = True
        return tensor_out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        sources = [tensor for _, tensor in tensors((args, kwargs)) if tensor.is_floating_point()]
        governed = bool(sources) and all(self._is_governed(tensor) for tensor in _operands(func, sources))
        result = func(*args, **kwargs)
        results = [tensor for _, tensor in tensors(result) if tensor.is_floating_point()]
        if name == "__setitem__" and isinstance(args[0], Tensor) and args[0].is_floating_point():
            results = [args[0]]
        if not sources or not results or only_asks(name):
            return result
        if moves(name, args, kwargs):
            self._moved(sources, results, governed)
        elif _in_autograd_function():
            pass  # the function as a whole is the operator
        else:
            computed = Computed(place(), name, governed)
            self.computed.append(computed)
            if find_operator(default_table(), func, name) is None:
                self.unknown[f"{computed.place} {name}"] += 1
            for tensor in results:
                if tensor in self._origin:
                    self._origin[tensor].later = computed
                self._origin[tensor] = computed
                self._governed.pop(tensor, None)
        return result

    def _is_governed(self, tensor: Tensor) -> bool:
        return tensor in self._governed

    def _moved(self, sources: list[Tensor], results: list[Tensor], governed: bool) -> None:
        origin = next((self._origin[tensor] for tensor in sources if tensor in self._origin), None)
        for tensor in results:
            if origin is not None:
                self._origin.setdefault(tensor, origin)
            if governed:
                self._governed[tensor] = True

    def report(self) -> Report:
        """Count what is at no site."""
        outside = Counter(f"{one.place} {one.name}" for one in self.computed if not one.is_at_site())
        return Report(len(self.computed), outside, self.unknown)


def operators_outside(entry: Entry, model: torch.nn.Module | None = None) -> Report:
    """Run a model of the zoo once with all stubs called, and look for operators that none of them sees."""
    model = ff.quantize_model(entry.make()) if model is None else model
    args, kwargs = entry.arguments()
    with torch.no_grad():
        model(*args, **kwargs)  # stubs that the source does not show appear
        mode = SiteMode()
        with stubs_live(model), recording(mode), open_functionals(), mode:
            model(*args, **kwargs)
    return mode.report()


def _operands(func: Any, sources: list[Tensor]) -> list[Tensor]:
    """The operands a quantizer is due for; a loss has some, its target is none."""
    row = default_table().find_callable(func)
    return sources if row is None or row.output_quantized else sources[: len(row.operands)]


def function_name(func: Any) -> str:
    """The name of a torch function; for an attribute of a tensor, the attribute's."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def only_asks(name: str) -> bool:
    return name in ("grad", "is_same_size", "__set__", "backward", "data_ptr", "_version", "shape", "dtype", "device")


def moves(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a function only moves data (dropout at rest included)."""
    if name.rstrip("_") in _DROPOUT:
        return not kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    row = default_table().find_method(name)
    return name in _MOVES or (row is not None and row.kind == "move")


def _in_autograd_function() -> bool:
    frame: FrameType | None = sys._getframe(2)
    for _ in range(5):
        if frame is None:
            return False
        names = frame.f_code.co_varnames
        if names and isinstance(frame.f_locals.get(names[0]), torch.autograd.function.FunctionCtx):
            return True
        frame = frame.f_back
    return False


def place() -> str:
    """``file:line`` of the code that called the operator: torch's layers count, torch's inner workings and ours do not."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        inner = ("/torch/" in file and "/torch/nn/" not in file) or "/fastforward/" in file or "<" in file
        if not inner and "/tests/zoo/" not in file:
            return f"{'/'.join(file.split('/')[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown place"

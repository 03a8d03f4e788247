"""Modules that are called from several places: one set of activation quantizers for each call path.

The first path has the plain names; on the second ``output_quantizer_call2`` stands where ``output_quantizer`` does on
the first, and so on, in the order in which the source names the calls, then in the order in which they run. Weights
and biases are the same values on every path, and so are their quantizers.
"""

import copy
import itertools
import re
import secrets
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from fastforward.autoquant.callpath import FIRST, taken
from fastforward.autoquant.scope import CALLS, SCOPES, SEVERAL, Scope
from fastforward.autoquant.sites import PARAMETER, on_call_path
from fastforward.exceptions import QuantizationWarning
from fastforward.nn.quantizer import Quantizer, QuantizerMetadata, QuantizerStub

if TYPE_CHECKING:
    from fastforward.nn.module import QuantizedModule

IDENTITY: Final = "_ff_identity_key"
PENDING: Final = "_ff_pending"
"""Where a module keeps quantizers that were loaded for sites which it will only find when it runs, by name."""
ANNOUNCED: Final = "_ff_announced"
"""Where a converted module keeps the modules that it calls on several call paths."""
HERE: Final = "_ff_here"
MOST: Final = 256
"""Call paths that a module may have: modules that call modules that call modules multiply."""
_PROCESS = secrets.token_hex(3)
_numbers = itertools.count()
_ON_OTHER_PATH = re.compile(r"_call\d+$")


def meet_modules(model: torch.nn.Module) -> None:
    """Find the call paths that the source shows, so that their stubs exist before the first run."""
    for module in list(model.modules()):
        for scope in list(module.__dict__.get(SCOPES, {}).values()):
            scope.meet_known()


def pending_quantizers(model: torch.nn.Module) -> list[tuple[str, Quantizer]]:
    """Name and quantizer of every site that was loaded and that only a run will find."""
    return [
        (f"{path}.{name}" if path else name, quantizer)
        for path, module in model.named_modules()
        for name, quantizer in module.__dict__.get(PENDING, {}).items()
    ]


def new_identity() -> str:
    """What tells the callers of a module apart; copies and pickles of a caller keep it."""
    return f"{_PROCESS}{next(_numbers)}"


def call_index(module: "QuantizedModule", label: str, scope: Scope) -> int:
    """The number of the call path that begins at ``label``, a call site in ``scope``; its stubs exist afterwards.

    A path that is found when quantizers are in place already, or that leads back into the module itself, shares those
    of the first.
    """
    calls: dict[str, int] = module.__dict__.setdefault(CALLS, {})
    known = calls.get(label)
    if known is not None:
        return known
    index = max(calls.values(), default=0) + 1
    if index > FIRST and not _loaded(module, index) and (_is_live(module) or _recursive(module, scope)):
        index = FIRST
    if index > MOST:
        _warn_shared(module)
        index = FIRST
    calls[label] = index
    if index > FIRST:
        module.__dict__[SEVERAL] = True
        module._ff_add_call_path(index, scope)
    return index


def recall(owner: "QuantizedModule") -> None:
    """Let the scopes of a copied or loaded ``owner`` meet the modules that those of the original called."""
    scopes = dict(_labelled(owner.__dict__.get(SCOPES, {}).values()))
    mine = f"{owner.__dict__.get(IDENTITY)}:"
    for module in owner.modules():
        if not getattr(type(module), "call_paths", False):  # an integer layer has one form for all its calls
            continue
        for label in module.__dict__.get(CALLS, ()):
            place, _, number = label.removeprefix(mine).rpartition(":")
            if label.startswith(mine) and place in scopes:
                scopes[place].meet(int(number), module)


def _labelled(scopes: Iterable[Scope]) -> Iterator[tuple[str, Scope]]:
    for scope in scopes:
        if scope.label is not None:
            yield scope.label, scope
        yield from _labelled(child for child in scope.children.values() if child.parent is scope)


def stubs_for_call(module: "QuantizedModule", index: int) -> dict[str, Quantizer]:
    """Stubs, or what a loaded state holds, for the activations of a hand-written layer on another call path."""
    pending = module.__dict__.get(PENDING, {})
    found: dict[str, Quantizer] = {}
    for name, quantizer in _of_first_path(module).items():
        other = on_call_path(name, index)
        if other in module.__dict__:
            continue
        loaded = pending.pop(other, None)
        metadata = copy.copy(quantizer.quant_metadata)
        found[other] = QuantizerStub(metadata=metadata) if loaded is None else loaded
        found[other].quant_metadata = metadata
    return found


def call_indices(module: "QuantizedModule") -> tuple[int, ...]:
    """The call paths of ``module`` that have quantizers or stubs of their own, the first included."""
    return tuple(sorted({FIRST, *module.__dict__.get(CALLS, {}).values()}))


def by_call_path(module: "QuantizedModule") -> dict[str, list[Quantizer]]:
    """For each activation of a hand-written layer with several call paths: its quantizers, those of the first first."""
    others = call_indices(module)[1:]
    found = _of_first_path(module) if others else {}
    return {
        name: [own, *(module.__dict__[on_call_path(name, index)] for index in others)] for name, own in found.items()
    }


def share_unreached(model: torch.nn.Module, is_dead: Callable[[dict[str, Quantizer]], bool]) -> None:
    """Give call paths that no data reached the quantizers of the first path that some did.

    Args:
        model: A model after calibration.
        is_dead: Told the activations' quantizers and stubs of one call path by full name; whether no data came there.
    """
    for path, module in list(model.named_modules()):
        paths = _paths(module) if CALLS in module.__dict__ else []
        prefix = f"{path}." if path else ""
        dead = [is_dead({prefix + name: quantizer for name, (_, quantizer) in one.items()}) for one in paths]
        if all(dead) or not any(dead):
            continue
        source = dict(paths[dead.index(False)].values())
        for names, unreached in zip(paths, dead, strict=True):
            for name, (base, _) in names.items() if unreached else ():
                if not source[base].is_stub():
                    setattr(module, name, source[base])


def _paths(module: Any) -> list[dict[str, tuple[str, Quantizer]]]:
    """For each call path of ``module``: its quantizers, with the names that they have on the first path."""
    mine = module.own_quantizers()
    found = []
    others = call_indices(module)[1:]
    first = {name: (name, q) for name, q in mine.items() if others and on_call_path(name, others[0]) in mine}
    for index in others:
        names = {name: on_call_path(name, index) for name in first}
        found.append({other: (name, mine[other]) for name, other in names.items() if other in mine})
    return [first, *found]


def here(module: "QuantizedModule") -> Any:
    """The module, or what has the quantizers of the running call path under the names of the first."""
    index = taken(module)
    return module if index == FIRST else module.__dict__[HERE].get(index, module)


def refresh_here(module: "QuantizedModule") -> None:
    """Look the quantizers of the other call paths up again, after some were attached or removed."""
    state, first = module.__dict__, _of_first_path(module)
    state[HERE] = {
        index: types.SimpleNamespace(**{name: state.get(on_call_path(name, index), own) for name, own in first.items()})
        for index in call_indices(module)[1:]
    }


def _of_first_path(module: "QuantizedModule") -> dict[str, Quantizer]:
    """The activations' quantizers of a hand-written layer on its first call path."""
    return {
        name: quantizer
        for name, quantizer in module.own_quantizers().items()
        if not _ON_OTHER_PATH.search(name) and not _is_parameter(quantizer.quant_metadata)
    }


def _is_parameter(metadata: QuantizerMetadata) -> bool:
    return PARAMETER in metadata


def _is_live(module: "QuantizedModule") -> bool:
    return any(not q.is_stub() and not _is_parameter(q.quant_metadata) for q in module.own_quantizers().values())


def _loaded(module: "QuantizedModule", index: int) -> bool:
    suffix = on_call_path("", index)
    return any(name.endswith(suffix) for name in (*module.__dict__.get(PENDING, {}), *module.own_quantizers()))


def _recursive(module: "QuantizedModule", scope: Scope) -> bool:
    """Whether ``scope`` runs, as far as is known, inside of ``module``."""
    caller: Any = scope
    while caller is not None and caller.owner is not module:
        caller = caller.root().caller
    return caller is not None


def _warn_shared(module: "QuantizedModule") -> None:
    msg = (
        f"{type(module).__name__} is called from more than {MOST} call paths: further ones share the quantizers of the "
        "first"
    )
    warnings.warn(msg, QuantizationWarning, stacklevel=2)

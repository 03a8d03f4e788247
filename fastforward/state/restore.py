"""A quantization state and a model in, the model with that state out, or an error and the model as it was.

Everything that can go wrong is found out first (`plan`); only then is the model changed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastforward.exceptions import FastForwardError, StateError
from fastforward.nn.call_paths import PENDING
from fastforward.nn.module import QuantizedModule
from fastforward.nn.quantizer import ParameterRows, Quantizer, QuantizerStub
from fastforward.quantization.tensor import QuantizedTensor
from fastforward.selection.mpath import FilterResult
from fastforward.selection.quantizers import all_quantizers
from fastforward.selection.rules_yaml import decode, quantizer_class
from fastforward.selection.scheme import REASON
from fastforward.state.capture import float_class, qualified_name, source_hash
from fastforward.state.manifest import Manifest, SavedInteger, SavedParts, SavedQuantizer

Change = Callable[[], None]


@dataclass
class Plan:
    """What loading will do.

    Attributes:
        changes: Assignments that cannot fail any more.
        problems: What does not fit, in words.
    """

    changes: list[Change] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Restorer:
    """One loading.

    Attributes:
        model: A model with the stubs that the state needs.
        manifest: The state.
        tensors: Its tensors by key.
        classes: Quantizer classes that the state may name beside our own.
        exclusive: Quantizers that are not in the state go back to stubs.
    """

    model: torch.nn.Module
    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
    classes: Mapping[str, type[Quantizer]]
    exclusive: bool = True

    @functools.cached_property
    def _modules(self) -> dict[str, torch.nn.Module]:
        return dict(self.model.named_modules())

    @functools.cached_property
    def _sites(self) -> dict[str, FilterResult]:
        return {site.full_name: site for site in all_quantizers(self.model)}

    def plan(self) -> Plan:
        """All changes and all problems.

        Raises:
            StateError: The state itself is wrong, whatever the model.
        """
        plan = Plan()
        self._check_modules(plan)
        for quantizer in self.manifest.quantizers:
            self._plan_quantizer(quantizer, plan)
        if self.exclusive:
            plan.changes.extend(self._stubbing())
        for integer in self.manifest.integers:
            self._plan_integer(integer, plan)
        self._plan_parameters(plan)
        return plan

    # ------------------------------------------------------------------ modules
    def _check_modules(self, plan: Plan) -> None:
        for path, saved in self.manifest.modules.items():
            module = self._modules.get(path)
            where = f"module {path!r}" if path else "the model"
            if module is None:
                plan.problems.append(f"{where} ({saved.cls}) does not exist")
            elif qualified_name(module) != saved.cls:
                plan.problems.append(f"{where} is a {qualified_name(module)} here and a {saved.cls} in the state")
            elif isinstance(module, QuantizedModule):
                self._check_sites(where, module, saved.sites, saved.source, plan)

    def _check_sites(
        self, where: str, module: QuantizedModule, saved: tuple[str, ...], source: str | None, plan: Plan
    ) -> None:
        current = source_hash(module)
        here = module.own_quantizers()
        gone = [name for name in saved if name not in here]
        if current == source or not gone:
            return
        new = [name for name in here if name not in saved]
        plan.problems.append(
            f"the source of {float_class(module).__qualname__} ({where}), or what it was rewritten with, has changed "
            f"since saving: sites gone: {', '.join(gone)}; new: {', '.join(new) or 'none'}"
        )

    # ------------------------------------------------------------------ quantizers
    def _plan_quantizer(self, saved: SavedQuantizer, plan: Plan) -> None:
        quantizer = self._make_quantizer(saved)
        for name in saved.sites:
            path, _, attribute = name.rpartition(".")
            owner = self._modules.get(path)
            if name in self._sites:
                plan.changes.append(_putting(self._sites[name], quantizer))
            elif isinstance(owner, QuantizedModule) and self._found_at_run_time(path, attribute, owner):
                plan.changes.append(_postponing(owner, attribute, quantizer))
            else:
                plan.problems.append(f"there is no site {name}")

    def _stubbing(self) -> Iterator[Change]:
        wanted = {name for quantizer in self.manifest.quantizers for name in quantizer.sites}
        for name, site in self._sites.items():
            if name not in wanted and isinstance(site.module, Quantizer) and not site.module.is_stub():
                yield _putting(site, QuantizerStub())

    def _found_at_run_time(self, path: str, attribute: str, owner: QuantizedModule) -> bool:
        """Whether the site is one that this very source shows only when it runs."""
        saved = self.manifest.modules.get(path)
        known = saved is not None and attribute in saved.sites and owner.call_paths
        return known and saved is not None and saved.source == source_hash(owner)

    def _make_quantizer(self, saved: SavedQuantizer) -> Quantizer:
        where = f"the state's quantizer {saved.sites[0]}"
        try:
            cls = quantizer_class(saved.cls, self.classes, where)
            quantizer = cls(**{name: decode(value) for name, value in saved.arguments.items()})
            self._fill(quantizer, saved)
        except (ValueError, TypeError, RuntimeError, AttributeError, OverflowError, FastForwardError) as error:
            msg = f"{where} cannot be made: {error}"
            raise StateError(msg) from error
        if saved.reason is not None:
            setattr(quantizer, REASON, saved.reason)
        if saved.parameter is not None:
            quantizer.parameter = ParameterRows(*saved.parameter)
        return quantizer

    def _fill(self, quantizer: Quantizer, saved: SavedQuantizer) -> None:
        tensors = {name: self.tensors[key].clone() for name, key in saved.tensors.items()}
        for name in saved.learned:
            quantizer._buffers.pop(name, None)
            quantizer._parameters[name] = torch.nn.Parameter(tensors[name])
        quantizer.load_state_dict(tensors)
        if saved.gradient_scale is not None:
            quantizer.__dict__["gradient_scale"] = saved.gradient_scale
        for name, tensor in quantizer.state_dict().items():
            if tensor.dtype != tensors[name].dtype:
                msg = f"{name} is {tensors[name].dtype} in the state, {tensor.dtype} in a {saved.cls}"
                raise StateError(msg)

    # ------------------------------------------------------------------ integer modules
    def _plan_integer(self, saved: SavedInteger, plan: Plan) -> None:
        current = self._modules.get(saved.path)
        if current is None:
            plan.problems.append(f"module {saved.path!r}, an {saved.cls} in the state, does not exist")
            return
        cls = integer_class(saved.cls)
        tensors = {name: self.tensors[key].clone() for name, key in saved.tensors.items()}
        try:
            new = cls.from_quantization_state(current, tensors, dict(saved.data))
        except Exception as error:
            # What rebuilds a layer from data of unknown origin may fail in any way; to the caller it is one error.
            msg = f"the state's {saved.cls} {saved.path!r} cannot be made: {error}"
            raise StateError(msg) from error
        plan.changes.append(_becoming(current, new))

    # ------------------------------------------------------------------ parameters and buffers
    def _plan_parameters(self, plan: Plan) -> None:
        entries = self.model.state_dict(keep_vars=True)
        ignored = self._own_prefixes()
        known = {name for name in entries if not name.startswith(ignored)} if ignored else set(entries)
        for name, saved in self.manifest.parameters.items():
            if isinstance(saved, SavedParts):
                self._plan_quantized_tensor(name, saved, plan)
            else:
                self._plan_tensor(name, entries.get(name), saved, plan)
        if self.manifest.weights:
            plan.problems.extend(f"the state has no {name}" for name in sorted(known - self.manifest.parameters.keys()))
        plan.problems.extend(self._untied(entries))

    def _own_prefixes(self) -> tuple[str, ...]:
        """Beginnings of names in the model's state that belong to quantizers or to modules that become integer."""
        sites = [*self._sites, *(i.path for i in self.manifest.integers)]
        return tuple(f"{name}." if name else "" for name in sites)

    def _plan_tensor(self, name: str, current: Any, key: str, plan: Plan) -> None:
        tensor = self.tensors[key]
        if current is None:
            owner, attribute = self._modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]
            if owner is not None and _is_empty_slot(owner, attribute):
                plan.changes.append(_filling(owner, attribute, tensor))
            else:
                plan.problems.append(f"the model has no {name}")
        elif not isinstance(current, torch.Tensor) or current.shape != tensor.shape or current.dtype != tensor.dtype:
            here = f"{tuple(current.shape)} {current.dtype}" if isinstance(current, torch.Tensor) else type(current)
            plan.problems.append(f"{name} is {here} here and {tuple(tensor.shape)} {tensor.dtype} in the state")
        elif current.is_meta:
            plan.problems.append(
                f"{name} has no memory to load into (device meta): call model.to_empty(device=...) first"
            )
        else:
            plan.changes.append(_copying(current, tensor))

    def _plan_quantized_tensor(self, name: str, saved: SavedParts, plan: Plan) -> None:
        owner = self._modules.get(name.rpartition(".")[0])
        attribute = name.rpartition(".")[2]
        if owner is None or attribute not in {*owner._parameters, *owner._buffers}:
            plan.problems.append(f"the model has no {name}")
            return
        try:
            value = self._quantized_tensor(saved)
        except (ValueError, TypeError, RuntimeError, AttributeError, FastForwardError) as error:
            msg = f"the state's quantized tensor {name} cannot be made: {error}"
            raise StateError(msg) from error
        plan.changes.append(_setting_quantized(owner, attribute, value))

    def _quantized_tensor(self, saved: SavedParts) -> QuantizedTensor:
        parts = {name: self.tensors[key].clone() for name, key in saved.parts.items()}
        dtype = getattr(torch, saved.dtype)
        bounds = saved.quant_min, saved.quant_max
        value = QuantizedTensor(
            parts["int_data"], parts["scale"], parts.get("zero_point"), saved.block_size, dtype, *bounds
        )
        value.dequantize()  # fails unless block size, scale and data fit each other
        return value

    def _untied(self, entries: Mapping[str, Any]) -> Iterator[str]:
        """Names that are one tensor in the model and several in the state: whichever came last would win."""
        first = dict[int, str]()
        for name, value in entries.items():
            saved = self.manifest.parameters.get(name)
            if not isinstance(saved, str) or not isinstance(value, torch.Tensor):
                continue
            other = first.setdefault(id(value), name)
            other_key = self.manifest.parameters[other]
            if other_key != saved and not torch.equal(self.tensors[saved], self.tensors[str(other_key)]):
                yield f"{other} and {name} are tied in the model and differ in the state"


def integer_class(name: str) -> Any:
    """The class of that name among those of `fastforward.integer` that can be loaded.

    Raises:
        StateError: There is none.
    """
    integer = importlib.import_module("fastforward.integer")
    cls = getattr(integer, name) if name in integer.__all__ else None
    if not isinstance(cls, type) or not hasattr(cls, "from_quantization_state"):
        msg = f"the state names {name!r}, which is not a class of fastforward.integer that can be loaded"
        raise StateError(msg)
    return cls


def finish_integers(model: torch.nn.Module) -> None:
    """Do to a model with loaded integer layers what conversion does: values between them stay integers too."""
    grids = importlib.import_module("fastforward.integer.forms").Grids()
    layer_class = importlib.import_module("fastforward.integer.layer").IntegerLayer
    for module in model.modules():
        if isinstance(module, layer_class):
            module.grid = grids.share(module.grid)
    importlib.import_module("fastforward.integer.conversion").finish(model, ())


def _device_of(module: torch.nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _putting(site: FilterResult, quantizer: Quantizer) -> Change:
    def change() -> None:
        current = getattr(site.parent, site.parent_attribute)
        quantizer.quant_metadata = current.quant_metadata
        quantizer.to(_device_of(site.parent))
        setattr(site.parent, site.parent_attribute, quantizer)

    return change


def _postponing(owner: QuantizedModule, attribute: str, quantizer: Quantizer) -> Change:
    def change() -> None:
        quantizer.to(_device_of(owner))
        owner.__dict__.setdefault(PENDING, {})[attribute] = quantizer
        owner._quantizers_changed()

    return change


def _becoming(current: torch.nn.Module, new: torch.nn.Module) -> Change:
    """`current` takes over class and contents of `new`, so that every place that holds it sees the change."""

    def change() -> None:
        new.to(_device_of(current))
        new.train(current.training)
        object.__setattr__(current, "__class__", type(new))
        current.__dict__.clear()
        current.__dict__.update(new.__dict__)

    return change


def _copying(current: torch.Tensor, tensor: torch.Tensor) -> Change:
    def change() -> None:
        with torch.no_grad():
            current.copy_(tensor)

    return change


def _is_empty_slot(owner: torch.nn.Module, name: str) -> bool:
    """Whether a parameter or buffer of that name may stand there and does not: a smoothing, or a folded norm's bias."""
    return any(name in slots and slots[name] is None for slots in (owner._parameters, owner._buffers))


def _filling(owner: torch.nn.Module, name: str, tensor: torch.Tensor) -> Change:
    def change() -> None:
        value = tensor.clone().to(_device_of(owner))
        is_parameter = name in owner._parameters
        setattr(owner, name, torch.nn.Parameter(value, value.is_floating_point()) if is_parameter else value)

    return change


def _setting_quantized(owner: torch.nn.Module, name: str, value: QuantizedTensor) -> Change:
    def change() -> None:
        moved = value.to(_device_of(owner))
        setattr(owner, name, torch.nn.Parameter(moved, requires_grad=False) if name in owner._parameters else moved)

    return change

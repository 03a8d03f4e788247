"""The manifest of a quantization state as records, and the checks that turn JSON of unknown origin into them.

::

    {"version": 1, "written_by": {"fastforward": ..., "torch": ...}, "model": "Net", "weights": true,
     "modules":    {path: {"class": ..., "source": hash of the class's source or null, "sites": [...]}},
     "quantizers": [{"sites": [...], "class": ..., "arguments": {...}, "tensors": {name: key}, "learned": [...],
                     "gradient_scale": ..., "reason": ..., "parameter": [name, start, stop] or null, "integer": ...}],
     "integers":   [{"path": ..., "class": ..., "data": {...}, "tensors": {name: key}}],
     "parameters": {name: key, or {"parts": {name: key}, "block_size": [...], ...}}}

Keys name tensors of the file. Two parameters with one key are tied; a quantizer with two sites is shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from fastforward.exceptions import StateError

VERSION = 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class SavedModule:
    """A quantized module.

    Attributes:
        cls: Qualified name of the float class.
        source: Hash of that class's source; None where there is none to read.
        sites: Names of its stubs and quantizers.
    """

    cls: str
    source: str | None
    sites: tuple[str, ...]


@dataclass(frozen=True)
class SavedQuantizer:
    """A quantizer.

    Attributes:
        sites: Full names of the sites where it stands.
        cls: Name of its class.
        arguments: Arguments of the class, as `fastforward.selection.rules_yaml` encodes them.
        tensors: Keys of its tensors, by name.
        learned: Which of them are parameters.
        gradient_scale: What their gradients are multiplied by, beside LSQ's own factor; None for no factor at all.
        reason: Why it stands there.
        parameter: Name, first and last row of the parameter that it rounds, if calibration has seen one.
        integer: Whether it gives integers to a product in a module's own code.
    """

    sites: tuple[str, ...]
    cls: str
    arguments: Mapping[str, Any]
    tensors: Mapping[str, str]
    learned: tuple[str, ...] = ()
    gradient_scale: float | None = None
    reason: str | None = None
    parameter: tuple[str, int, int] | None = None
    integer: bool = False


@dataclass(frozen=True)
class SavedInteger:
    """A module that multiplies integers.

    Attributes:
        path: Where it stands.
        cls: Name of its class in `fastforward.integer`.
        data: What its class needs beside tensors.
        tensors: Keys of its tensors, by name.
    """

    path: str
    cls: str
    data: Mapping[str, Any]
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class SavedParts:
    """A parameter that stores integers, a `QuantizedTensor`."""

    parts: Mapping[str, str]
    block_size: tuple[int, ...]
    dtype: str
    quant_min: int | None
    quant_max: int | None


@dataclass(frozen=True)
class Manifest:
    """What a state says about a model; see the module's description."""

    model: str
    weights: bool
    modules: Mapping[str, SavedModule] = field(default_factory=dict)
    quantizers: tuple[SavedQuantizer, ...] = ()
    integers: tuple[SavedInteger, ...] = ()
    parameters: Mapping[str, str | SavedParts] = field(default_factory=dict)
    written_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_integer(self) -> bool:
        """Whether the model has been converted."""
        return bool(self.integers) or any(quantizer.integer for quantizer in self.quantizers)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `from_json`."""
        content = dataclasses.asdict(self)
        for record in (*content["modules"].values(), *content["quantizers"], *content["integers"]):
            record["class"] = record.pop("cls")
        return {"version": VERSION, **content}


def from_json(content: Mapping[str, Any], keys: set[str]) -> Manifest:
    """The manifest that `Manifest.to_json` wrote.

    Args:
        content: JSON data of unknown origin.
        keys: Names of the tensors that it may refer to.

    Raises:
        StateError: Something in it is missing, of another type, or of a later version.
    """
    written_by = _strings(content.get("written_by"), "written_by")
    version = content.get("version")
    if version != VERSION or type(version) is not int:
        by = ", ".join(f"{name} {number}" for name, number in written_by.items())
        msg = f"the state has version {version!r} (written by {by}); this fastforward reads version {VERSION}"
        raise StateError(msg)
    reader = _Reader(keys)
    modules = _typed(content, "modules", dict, "the manifest")
    parameters = _typed(content, "parameters", dict, "the manifest")
    return Manifest(
        model=_typed(content, "model", str, "the manifest"),
        weights=_typed(content, "weights", bool, "the manifest"),
        modules={path: reader.module(path, record) for path, record in modules.items()},
        quantizers=tuple(map(reader.quantizer, _typed(content, "quantizers", list, "the manifest"))),
        integers=tuple(map(reader.integer, _typed(content, "integers", list, "the manifest"))),
        parameters={name: reader.parameter(name, record) for name, record in parameters.items()},
        written_by=written_by,
    )


@dataclass(frozen=True)
class _Reader:
    keys: set[str]

    def module(self, path: str, record: Any) -> SavedModule:
        where = f"module {path!r}"
        source = record.get("source") if isinstance(record, dict) else None
        if source is not None and not isinstance(source, str):
            _malformed(where, "source")
        return SavedModule(_typed(record, "class", str, where), source, _names(record, "sites", where))

    def quantizer(self, record: Any) -> SavedQuantizer:
        sites = _names(record, "sites", "a quantizer")
        where = f"quantizer {', '.join(sites)}"
        reason, factor = record.get("reason"), record.get("gradient_scale")
        if not sites or not isinstance(reason, str | None) or not isinstance(factor, float | None):
            _malformed(where, "sites, reason or gradient_scale")
        tensors = self.tensors(record, "tensors", where)
        learned = _names(record, "learned", where)
        if not set(learned) <= tensors.keys():
            _malformed(where, "learned")
        cls, arguments = _typed(record, "class", str, where), _typed(record, "arguments", dict, where)
        parameter, integer = _rows(record.get("parameter"), where), record.get("integer") is True
        return SavedQuantizer(sites, cls, arguments, tensors, learned, factor, reason, parameter, integer)

    def integer(self, record: Any) -> SavedInteger:
        path = _typed(record, "path", str, "an integer module")
        where = f"integer module {path!r}"
        cls, data = _typed(record, "class", str, where), _typed(record, "data", dict, where)
        return SavedInteger(path, cls, data, self.tensors(record, "tensors", where))

    def parameter(self, name: str, record: Any) -> str | SavedParts:
        if isinstance(record, str):
            return self.key(record, f"parameter {name!r}")
        where = f"parameter {name!r}"
        block_size = _typed(record, "block_size", list, where)
        bounds = [record.get("quant_min"), record.get("quant_max")]
        if not all(type(size) is int and size > 0 for size in block_size):
            _malformed(where, "block_size")
        if not all(bound is None or type(bound) is int for bound in bounds):
            _malformed(where, "quant_min or quant_max")
        parts = self.tensors(record, "parts", where)
        if not {"int_data", "scale"} <= parts.keys() <= {"int_data", "scale", "zero_point"}:
            _malformed(where, "parts")
        return SavedParts(parts, tuple(block_size), _typed(record, "dtype", str, where), *bounds)

    def tensors(self, record: Any, name: str, where: str) -> Mapping[str, str]:
        found = _strings(record.get(name) if isinstance(record, dict) else None, f"{name} of {where}")
        return {short: self.key(key, where) for short, key in found.items()}

    def key(self, key: str, where: str) -> str:
        if key not in self.keys:
            msg = f"the state is malformed: {where} refers to tensor {key!r}, which it does not hold"
            raise StateError(msg)
        return key


def _typed(record: Any, name: str, kind: type[_T], where: str) -> _T:
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is not kind:
        _malformed(where, name)
    return value


def _names(record: Any, name: str, where: str) -> tuple[str, ...]:
    names = _typed(record, name, list, where)
    if not all(isinstance(item, str) for item in names):
        _malformed(where, name)
    return tuple(names)


def _rows(record: Any, where: str) -> tuple[str, int, int] | None:
    if record is None:
        return None
    if not isinstance(record, list) or [type(item) for item in record] != [str, int, int]:
        _malformed(where, "parameter")
    name, start, stop = record
    return name, start, stop


def _strings(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        _malformed("the manifest", what)
    return value


def _malformed(where: str, what: str) -> NoReturn:
    msg = f"the state is malformed: {what} of {where} is missing or of another type; save it again"
    raise StateError(msg)

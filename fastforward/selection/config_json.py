"""Configurations of ``quantize_`` as plain data for JSON, and back; classes by name, from those that are registered.

::

    {"_type": "StaticConfig", "_version": 1,
     "_data": {"target_dtype": {"dtype": "uint8"}, "granularity": {"PerGroup": {"group_size": 32}}}}

Nothing named in the data is imported: a class counts if a handler is registered for it, or if it is given.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastforward.quantization.granularity import Granularity
from fastforward.quantization.mapping import MappingType, ZeroPointDomain
from fastforward.selection import rules_yaml
from fastforward.selection.module_configs import FqnToConfig, QuantConfig, registered_configs

VERSION = 1
_ENUMS: Mapping[str, type[enum.Enum]] = {"MappingType": MappingType, "ZeroPointDomain": ZeroPointDomain}


def config_to_dict(config: QuantConfig) -> dict[str, Any]:
    """A configuration as data that ``json.dumps`` takes.

    Args:
        config: A configuration whose fields hold numbers, strings, data types, granularities, mapping types, further
            configurations, and lists, tuples and mappings of these.

    Returns:
        Its class's name and its fields.

    Raises:
        TypeError: ``config`` is no configuration.
        ValueError: A field holds something else; the message names it.

    Example:
        >>> from fastforward.selection.module_configs import FqnToConfig
        >>> config_to_dict(FqnToConfig({"head": None}))["_data"]
        {'fqn_to_config': {'_dict': {'head': None}}}
    """
    if not isinstance(config, QuantConfig) or not dataclasses.is_dataclass(config):
        msg = f"config must be an instance of a QuantConfig that is a dataclass, got {config!r}"
        raise TypeError(msg)
    name = type(config).__name__
    fields = [field.name for field in dataclasses.fields(config) if field.init]
    data = {field: _encoded(getattr(config, field), f"{name}.{field}") for field in fields}
    return {"_type": name, "_version": VERSION, "_data": data}


def config_from_dict(data: Mapping[str, Any], *, classes: Iterable[type[QuantConfig]] = ()) -> QuantConfig:
    """The configuration that ``config_to_dict`` wrote.

    Args:
        data: As read from JSON, of unknown origin.
        classes: Configuration classes that the data may name beside those with a registered handler.

    Raises:
        ValueError: The data is no configuration, or names what is not known.
    """
    known: dict[str, list[type[QuantConfig]]] = {}
    named: tuple[type[QuantConfig], ...] = (FqnToConfig, *registered_configs(), *classes)
    for cls in dict.fromkeys(named):
        known.setdefault(cls.__name__, []).append(cls)
    return _config(data, known, "the configuration")


def _encoded(value: Any, where: str) -> Any:
    if isinstance(value, QuantConfig):
        return config_to_dict(value)
    if isinstance(value, enum.Enum):
        return {type(value).__name__: value.name} if type(value).__name__ in _ENUMS else _refuse(value, where)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            _refuse(value, where)
        return {"_dict": {key: _encoded(item, f"{where}[{key!r}]") for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"_tuple": items}
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype, Granularity)):
        return rules_yaml.encode(value)
    return _refuse(value, where)


def _refuse(value: Any, where: str) -> Any:
    msg = f"{where} holds {value!r}, which JSON cannot name; use numbers, strings, granularities, data types"
    raise ValueError(msg)


def _config(data: Any, known: Mapping[str, list[type[QuantConfig]]], where: str) -> QuantConfig:
    if not isinstance(data, Mapping) or data.keys() != {"_type", "_version", "_data"}:
        msg = f"{where} is not a mapping of '_type', '_version' and '_data'"
        raise ValueError(msg)
    if data["_version"] != VERSION:
        msg = f"{where} has version {data['_version']!r}; only {VERSION} is supported"
        raise ValueError(msg)
    candidates = known.get(str(data["_type"]), [])
    if len(candidates) != 1:
        what = "is no registered configuration class" if not candidates else "is the name of several classes"
        msg = f"{where}: {data['_type']!r} {what}; pass the one you mean in classes=[...]"
        raise ValueError(msg)
    fields = data["_data"]
    names = {field.name for field in dataclasses.fields(candidates[0]) if field.init}
    if not isinstance(fields, Mapping) or not fields.keys() <= names:
        msg = f"{where}: the fields of {data['_type']} are {sorted(names)}, got {fields!r}"
        raise ValueError(msg)
    values = {name: _decoded(value, known, f"{data['_type']}.{name}") for name, value in fields.items()}
    try:
        return candidates[0](**values)
    except (TypeError, ValueError, AttributeError) as error:
        msg = f"{where}: {data['_type']} cannot be made: {error}"
        raise ValueError(msg) from error


def _decoded(value: Any, known: Mapping[str, list[type[QuantConfig]]], where: str) -> Any:
    if isinstance(value, list):
        return [_decoded(item, known, where) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "_type" in value:
        return _config(value, known, where)
    tag, content = next(iter(value.items())) if len(value) == 1 else ("", None)
    if tag == "_tuple" and isinstance(content, list):
        return tuple(_decoded(item, known, where) for item in content)
    if tag == "_dict" and isinstance(content, Mapping):
        return {key: _decoded(item, known, f"{where}[{key!r}]") for key, item in content.items()}
    if tag in _ENUMS and isinstance(content, str) and content in _ENUMS[tag].__members__:
        return _ENUMS[tag][content]
    try:
        return rules_yaml.decode(dict(value))
    except ValueError as error:
        msg = f"{where}: {error}"
        raise ValueError(msg) from error

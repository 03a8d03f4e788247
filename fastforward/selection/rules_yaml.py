"""Rules as YAML and back: plain data only, read with the safe loader, classes by name from an allow-list.

::

    version: 1
    scheme: w8a8
    rules:
    - query: "**/[quantizer:parameter/weight]"
      quantizer: LinearQuantizer
      arguments: {num_bits: 4, granularity: {PerChannel: {dim: 0}}}
    - query: encoder.layer.0
      scheme: w4_g128
    - query: classifier
      float: true
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
import yaml

import fastforward.nn
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization import granularity as granularities
from fastforward.quantization.granularity import Granularity
from fastforward.selection import schemes
from fastforward.selection.scheme import Scheme

VERSION = 1
_PLAIN = (bool, int, float, str, type(None))

RuleFields: TypeAlias = "tuple[Any, Any, Mapping[str, Any]]"


def dump(scheme: Scheme | None, rules: Iterable[RuleFields]) -> str:
    """YAML text of a base scheme and of rules ``(query, target, arguments)``.

    Raises:
        ValueError: Something has no name in YAML; the message says which rule.
    """
    content: dict[str, Any] = {"version": VERSION}
    if scheme is not None:
        content["scheme"] = _scheme_name(scheme)
    content["rules"] = [_encode_rule(*rule) for rule in rules]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def load(text: str, classes: Mapping[str, type[Quantizer]]) -> tuple[str | None, list[RuleFields]]:
    """Base scheme and rules ``(query, target, arguments)`` of YAML text.

    Args:
        text: As `dump` writes it.
        classes: Quantizer classes that may be named beside those of `fastforward.nn`.

    Raises:
        ValueError: The text is no configuration.
    """
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        msg = f"not a YAML configuration: {error}"
        raise ValueError(msg) from error
    _require(isinstance(content, dict), "a configuration is a mapping with 'version' and 'rules'")
    unknown = content.keys() - {"version", "scheme", "rules"}
    _require(not unknown, f"unknown keys {sorted(map(str, unknown))}; known are version, scheme, rules")
    version = content.get("version", VERSION)
    _require(version == VERSION, f"version {version!r} of the configuration is not supported, only {VERSION}")
    rules = content.get("rules") or []
    _require(isinstance(rules, list), "'rules' is a list")
    scheme = content.get("scheme")
    _require(scheme is None or isinstance(scheme, str), "'scheme' is a name")
    return scheme, [_decode_rule(number, rule, classes) for number, rule in enumerate(rules, 1)]


def encode(value: Any) -> Any:
    """An argument as plain data.

    Raises:
        ValueError: The value has no name in YAML.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Granularity):
        return {type(value).__name__: _granularity_fields(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    msg = f"{value!r} cannot be written to YAML; use numbers, strings, granularities and data types"
    raise ValueError(msg)


def decode(value: Any) -> Any:
    """The argument that `encode` wrote as plain data.

    Raises:
        ValueError: The data names nothing known.
    """
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    _require(len(value) == 1, f"{value!r} is neither a granularity nor a data type")
    name, fields = next(iter(value.items()))
    if name == "dtype":
        dtype = getattr(torch, str(fields), None)
        _require(isinstance(dtype, torch.dtype), f"unknown data type {fields!r}")
        return dtype
    return _granularity(name, fields)


def _granularity(name: Any, fields: Any) -> Granularity:
    cls = getattr(granularities, str(name), None)
    known = isinstance(cls, type) and issubclass(cls, Granularity) and cls is not Granularity
    _require(known, f"unknown granularity {name!r}")
    _require(fields is None or isinstance(fields, dict), f"arguments of {name} are a mapping")
    try:
        made: Granularity = cls(**{key: decode(item) for key, item in (fields or {}).items()})  # type: ignore[misc]
    except TypeError as error:
        raise ValueError(str(error)) from error
    return made


def _granularity_fields(value: Granularity) -> dict[str, Any]:
    if isinstance(value, granularities.PerAxis):
        return {"axis": value.axis}
    if isinstance(value, granularities.PerBlock) and value.block_size_ is not None:
        return {"block_size": list(value.block_size_)}
    if not dataclasses.is_dataclass(value):
        msg = f"granularity {value!r} cannot be written to YAML: it is no dataclass"
        raise ValueError(msg)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: encode(item) for name, item in fields.items() if not name.endswith("_")}


def _encode_rule(query: Any, target: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(query, str):
        msg = f"rule {query!s} was built from selectors and cannot be written; give its query as text"
        raise ValueError(msg)
    if target is None:
        return {"query": query, "float": True}
    if isinstance(target, Scheme):
        return {"query": query, "scheme": _scheme_name(target)}
    if not isinstance(target, type):
        msg = f"rule {query!r} has a function, which YAML cannot name; use a quantizer class with arguments"
        raise ValueError(msg)
    encoded: dict[str, Any] = {"query": query, "quantizer": target.__name__}
    if kwargs:
        encoded["arguments"] = {name: encode(value) for name, value in kwargs.items()}
    return encoded


def _scheme_name(scheme: Scheme) -> str:
    if scheme.name not in schemes.names() or schemes.get(scheme.name) != scheme:
        msg = f"scheme {scheme.name!r} is not registered as it is; call ff.schemes.register with a name of its own"
        raise ValueError(msg)
    return scheme.name


def _decode_rule(number: int, rule: Any, classes: Mapping[str, type[Quantizer]]) -> RuleFields:
    where = f"rule {number}"
    _require(isinstance(rule, dict) and isinstance(rule.get("query"), str), f"{where} needs a 'query', a string")
    where = f"rule {number} ({rule['query']!r})"
    targets = rule.keys() & {"quantizer", "scheme", "float"}
    _require(len(targets) == 1, f"{where} needs exactly one of 'quantizer', 'scheme' and 'float'")
    unknown = rule.keys() - {"query", "arguments", *targets}
    _require(not unknown, f"{where} has unknown keys {sorted(map(str, unknown))}")
    arguments = rule.get("arguments") or {}
    _require(isinstance(arguments, dict), f"{where}: 'arguments' is a mapping")
    _require("quantizer" in rule or not arguments, f"{where}: 'arguments' belong to a quantizer")
    kwargs = {str(name): decode(value) for name, value in arguments.items()}
    return rule["query"], _decode_target(where, rule, classes), kwargs


def _decode_target(where: str, rule: Mapping[str, Any], classes: Mapping[str, type[Quantizer]]) -> Any:
    if "float" in rule:
        _require(rule["float"] is True, f"{where}: 'float' is true or absent")
        return None
    if "scheme" in rule:
        _require(isinstance(rule["scheme"], str), f"{where}: 'scheme' is a name")
        return rule["scheme"]
    return quantizer_class(str(rule["quantizer"]), classes, where)


def quantizer_class(name: str, classes: Mapping[str, type[Quantizer]], where: str) -> type[Quantizer]:
    """The quantizer class of that name: one of `classes`, or of those that `fastforward.nn` exports.

    Raises:
        ValueError: There is none.
    """
    found = classes.get(name) or (getattr(fastforward.nn, name, None) if name in fastforward.nn.__all__ else None)
    known = isinstance(found, type) and issubclass(found, Quantizer)
    _require(known, f"{where}: unknown quantizer class {name!r}; pass classes={{{name!r}: ...}} for one of your own")
    assert isinstance(found, type)  # checked above
    return found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

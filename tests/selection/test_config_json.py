"""Configurations of quantize_ as JSON: what comes back is equal, what the data may name is what is registered."""

import dataclasses
import json
from typing import Any

import pytest
import torch

import fastforward as ff
from fastforward.quantization import MappingType, PerAxis, PerBlock, PerGroup
from fastforward.selection import config_from_dict, config_to_dict
from fastforward.selection.module_configs import FqnToConfig


@dataclasses.dataclass
class StaticConfig(ff.QuantConfig):
    target_dtype: torch.dtype = torch.uint8
    granularity: Any = None
    mapping_type: MappingType = MappingType.ASYMMETRIC
    options: Any = None
    calls: int = dataclasses.field(default=0, init=False)


@ff.register_quantize_module_handler(StaticConfig)
def _keep(module: torch.nn.Module, config: StaticConfig) -> torch.nn.Module:
    return module


@dataclasses.dataclass
class Unregistered(ff.QuantConfig):
    bits: int = 8


@pytest.mark.parametrize(
    "config",
    [
        StaticConfig(),
        StaticConfig(torch.float8_e4m3fn, PerAxis(0), MappingType.SYMMETRIC),
        StaticConfig(torch.int8, PerGroup(32), options={"eps": 1e-6, "names": ["a", ("b", None)], "dtype": torch.half}),
        StaticConfig(granularity=[PerBlock(block_size=(1, 4)), PerBlock(1, 4, 0)], options=()),
        StaticConfig(options=StaticConfig(torch.int8)),
        FqnToConfig({"head": None, r"re:layers\.\d+": StaticConfig(torch.int8), "_default": FqnToConfig()}),
    ],
)
def test_what_was_written_comes_back(config: ff.QuantConfig) -> None:
    back = config_from_dict(json.loads(json.dumps(config_to_dict(config), allow_nan=False)))
    assert back == config and type(back) is type(config)


def test_the_order_of_names_is_kept() -> None:
    config = FqnToConfig({"re:b.*": None, "re:a.*": StaticConfig()})
    back = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert isinstance(back, FqnToConfig) and list(back.fqn_to_config) == ["re:b.*", "re:a.*"]


def test_a_class_without_handler_is_named_when_reading() -> None:
    data = config_to_dict(Unregistered(4))
    with pytest.raises(ValueError, match="'Unregistered' is no registered configuration class"):
        config_from_dict(data)
    assert config_from_dict(data, classes=[Unregistered]) == Unregistered(4)


@pytest.mark.parametrize(
    ("value", "where"),
    [(len, "StaticConfig.options"), ({"a": [object()]}, r"options\['a'\]\[0\]"), ({1: 2}, "StaticConfig.options")],
)
def test_what_json_cannot_name_is_refused(value: Any, where: str) -> None:
    with pytest.raises(ValueError, match=where):
        config_to_dict(StaticConfig(options=value))


def test_only_configurations_are_written() -> None:
    with pytest.raises(TypeError, match="QuantConfig"):
        config_to_dict("w8a8")  # type: ignore[arg-type]


def forged(**changes: Any) -> dict[str, Any]:
    return {**config_to_dict(StaticConfig()), **changes}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "is not a mapping of"),
        ({}, "is not a mapping of"),
        (forged(more=1), "is not a mapping of"),
        (forged(_version=2), "version 2"),
        (forged(_type="os.system"), "no registered"),
        (forged(_type=["a"]), "no registered"),
        (forged(_data=[]), "the fields of StaticConfig"),
        (forged(_data={"calls": 3}), "the fields of StaticConfig"),
        (forged(_data={"target_dtype": {"dtype": "nn"}}), "StaticConfig.target_dtype: unknown data type"),
        (forged(_data={"granularity": {"Granularity": {}}}), "unknown granularity"),
        (forged(_data={"granularity": {"PerGroup": {"group_size": 0}}}), "group_size must be positive"),
        (forged(_data={"mapping_type": {"MappingType": "SIDEWAYS"}}), "StaticConfig.mapping_type"),
        (forged(_data={"options": {}}), "StaticConfig.options"),
        (forged(_data={"options": {"_type": "Unregistered", "_version": 1, "_data": {}}}), "no registered"),
        ({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": 3}}, "cannot be made"),
    ],
)
def test_forged_data_is_a_value_error_that_says_where(data: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config_from_dict(data)


def test_two_classes_of_one_name_are_told_apart_by_the_reader() -> None:
    other = dataclasses.make_dataclass("StaticConfig", [("bits", int, 8)], bases=(ff.QuantConfig,))
    with pytest.raises(ValueError, match="several classes"):
        config_from_dict(config_to_dict(StaticConfig()), classes=[other])

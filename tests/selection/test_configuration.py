"""QuantizationConfig and the collection of quantizers: which rule decides, what may be overwritten, YAML."""

import copy

import pytest
import torch
from torch import nn

from fastforward.exceptions import QuantizationError
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.quantizer import Quantizer
from fastforward.quantization.granularity import PerAxis, PerBlock, PerChannel, PerGroup
from fastforward.selection import QuantizationConfig, find_quantizers, mpath, schemes
from fastforward.selection.quantizers import all_quantizers

WEIGHTS = "**/[quantizer:parameter/weight]"


class Own(Quantizer):
    def simulate(self, x):
        return x


@pytest.fixture
def net():
    return nn.Sequential(QuantizedLinear(8, 8), nn.Sequential(QuantizedLinear(8, 8), QuantizedLinear(8, 2, bias=False)))


def bits(net):
    found = all_quantizers(net).named_modules()
    return {name: quantizer.num_bits for name, quantizer in found if not quantizer.is_stub()}


def test_quantizers_found_are_initialized_and_keep_their_metadata(net):
    metadata = net[0].weight_quantizer.quant_metadata
    found = find_quantizers(net, WEIGHTS)
    assert found.full_names() == ["0.weight_quantizer", "1.0.weight_quantizer", "1.1.weight_quantizer"]
    found.initialize(LinearQuantizer, num_bits=4, granularity=PerChannel(0))
    assert bits(net) == dict.fromkeys(found.full_names(), 4)
    assert net[0].weight_quantizer.quant_metadata is metadata
    assert net[0].weight_quantizer is found[0].module
    find_quantizers(net, "0/input_quantizer").initialize(lambda name, current: LinearQuantizer(len(name) - 4))
    assert bits(net)["0.input_quantizer"] == len("0.input_quantizer") - 4
    find_quantizers(net, "0/output_quantizer").initialize(lambda name, current: None)
    assert net[0].output_quantizer.is_stub()


def test_overwrite_policies(net):
    find_quantizers(net, "0/weight_quantizer").initialize(LinearQuantizer, num_bits=3)
    weights = find_quantizers(net, WEIGHTS)
    with pytest.raises(QuantizationError, match=r"already quantized: 0\.weight_quantizer"):
        weights.initialize(LinearQuantizer, num_bits=4)
    assert bits(net) == {"0.weight_quantizer": 3}
    weights.initialize(LinearQuantizer, num_bits=4, overwrite_policy="skip")
    assert bits(net) == {"0.weight_quantizer": 3, "1.0.weight_quantizer": 4, "1.1.weight_quantizer": 4}
    weights.initialize(LinearQuantizer, num_bits=5, overwrite_policy="overwrite")
    assert set(bits(net).values()) == {5}
    with pytest.raises(ValueError, match="unknown overwrite_policy"):
        weights.initialize(LinearQuantizer, num_bits=4, overwrite_policy="replace")


@pytest.mark.parametrize(
    ("factory", "kwargs", "reason"),
    [
        (nn.Linear, {}, "not a Quantizer class"),
        (lambda name, current: LinearQuantizer(8), {"num_bits": 4}, "for a quantizer class"),
        (7, {}, "quantizer class or a function"),
        (lambda name, current: 3, {}, "instead of a Quantizer"),
    ],
)
def test_wrong_factories_are_type_errors(net, factory, kwargs, reason):
    with pytest.raises(TypeError, match=reason):
        find_quantizers(net, WEIGHTS).initialize(factory, **kwargs)
    with pytest.raises(TypeError, match=reason):
        QuantizationConfig().add_rule(WEIGHTS, factory, **kwargs).initialize(net)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([(WEIGHTS, 4)], {"0": 4, "1.0": 4, "1.1": 4}),
        ([(WEIGHTS, 4), ("1/*/weight_quantizer", 6)], {"0": 4, "1.0": 6, "1.1": 6}),
        ([("1/*/weight_quantizer", 6), (WEIGHTS, 4)], {"0": 4, "1.0": 4, "1.1": 4}),
        ([(WEIGHTS, 4), ("1.1.weight_quantizer", 2)], {"0": 4, "1.0": 4, "1.1": 2}),
        ([(WEIGHTS, 4), (r"re:1\.\d\.weight_quantizer", 2)], {"0": 4, "1.0": 2, "1.1": 2}),
        ([(WEIGHTS, 4), ("re:weight_quantizer", 2)], {"0": 4, "1.0": 4, "1.1": 4}),
        ([(WEIGHTS, 4), ("1", None)], {"0": 4}),
        ([(WEIGHTS, 4), ("1", None), ("1/0/weight_quantizer", 7)], {"0": 4, "1.0": 7}),
        ([(WEIGHTS, 4), ("1.0", None)], {"0": 4, "1.1": 4}),
        ([(WEIGHTS, 4), (r"re:1\.[0-9]", None)], {"0": 4}),
        ([("**", "w8"), ("1", "w4")], {"0": 8, "1.0": 4, "1.1": 4}),
        ([("nothing", 4)], {}),
    ],
)
def test_the_last_rule_that_selects_a_site_wins(net, rules, expected):
    config = QuantizationConfig()
    for query, target in rules:
        if isinstance(target, int):
            config.add_rule(query, LinearQuantizer, num_bits=target)
        else:
            config.add_rule(query, target)
    config.initialize(net)
    assert {name.removesuffix(".weight_quantizer"): number for name, number in bits(net).items()} == expected


def test_the_base_scheme_yields_to_every_rule(net):
    config = QuantizationConfig("w8a8").add_rule("1", None).add_rule("1.1", "w4")
    config.apply(net)
    assert bits(net) == {"0.input_quantizer": 8, "0.weight_quantizer": 8, "1.1.weight_quantizer": 4}
    assert config.steps == schemes.get("w8a8").steps and config.observer == "auto"


def test_precedence_can_be_changed(net):
    class FirstWins(QuantizationConfig):
        def precedence_score(self, rule, result):
            return -self.rules.index(rule)

    config = FirstWins().add_rule(WEIGHTS, LinearQuantizer, num_bits=4).add_rule("**", LinearQuantizer, num_bits=8)
    config.initialize(net)
    assert bits(net)["0.weight_quantizer"] == 4 and bits(net)["0.input_quantizer"] == 8


def test_a_refused_configuration_leaves_the_model_as_it_was(net):
    find_quantizers(net, "1/1/weight_quantizer").initialize(LinearQuantizer, num_bits=3)
    config = QuantizationConfig().add_rule(WEIGHTS, LinearQuantizer, num_bits=4)
    with pytest.raises(QuantizationError, match="already quantized"):
        config.initialize(net)
    assert bits(net) == {"1.1.weight_quantizer": 3}
    config.initialize(net, overwrite_policy="skip")
    assert bits(net) == {"0.weight_quantizer": 4, "1.0.weight_quantizer": 4, "1.1.weight_quantizer": 3}
    config.initialize(net, overwrite_policy="overwrite")
    assert set(bits(net).values()) == {4}


def test_a_shared_stub_becomes_one_quantizer(net):
    net[1][0].weight_quantizer = net[0].weight_quantizer
    QuantizationConfig("w8").initialize(net)
    assert net[0].weight_quantizer is net[1][0].weight_quantizer
    assert net[1][1].weight_quantizer is not net[0].weight_quantizer


def test_mappings_prefer_names_over_expressions(net):
    QuantizationConfig.from_mapping({"1.1": None, r"re:1\.\d": "w4", "**": "w8"}).initialize(net)
    assert bits(net) == {"0.weight_quantizer": 8, "1.0.weight_quantizer": 4}
    assert net[1][1].weight_quantizer.is_stub()


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        QuantizationConfig("w8a8"),
        QuantizationConfig().add_rule(WEIGHTS, LinearQuantizer, num_bits=4, granularity=PerChannel((0, 1))),
        QuantizationConfig().add_rule(WEIGHTS, LinearQuantizer, num_bits=4, granularity=PerAxis(1)),
        QuantizationConfig().add_rule(WEIGHTS, LinearQuantizer, num_bits=4, granularity=PerGroup(4)),
        QuantizationConfig().add_rule(WEIGHTS, LinearQuantizer, num_bits=4, granularity=PerBlock(1, 4, 0)),
        QuantizationConfig().add_rule(WEIGHTS, LinearQuantizer, num_bits=4, granularity=PerBlock(block_size=(1, 4))),
        QuantizationConfig().add_rule("re:ä.*", LinearQuantizer, num_bits=8, quantized_dtype=torch.uint8),
        QuantizationConfig("w8").add_rule("a.b", None).add_rule("**/[re:x\\d[0-9\\]]", "w4_g128"),
    ],
)
def test_yaml_round_trip(config, tmp_path):
    path = tmp_path / "rules.yaml"
    text = config.to_yaml(path)
    assert QuantizationConfig.from_yaml(path) == QuantizationConfig.from_yaml(str(path)) == config
    assert QuantizationConfig.from_yaml(text) == config
    assert QuantizationConfig.from_yaml(text).to_yaml() == text


def test_own_classes_are_read_only_when_they_are_given():
    text = QuantizationConfig().add_rule("**", Own).to_yaml()
    with pytest.raises(ValueError, match="unknown quantizer class 'Own'"):
        QuantizationConfig.from_yaml(text)
    assert QuantizationConfig.from_yaml(text, classes={"Own": Own}).rules[0].target is Own


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig().add_rule(mpath.Wildcard(), LinearQuantizer, num_bits=4),
        QuantizationConfig().add_rule("a", lambda name, current: LinearQuantizer(8)),
        QuantizationConfig().add_rule("a", LinearQuantizer, num_bits=4, granularity=object()),
        QuantizationConfig(schemes.get("w8").with_changes(name="mine")),
    ],
)
def test_what_yaml_cannot_name_is_refused(config):
    with pytest.raises(ValueError, match="cannot|not registered"):
        config.to_yaml()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n- b\n", "is a mapping"),
        ("a: [\n", "not a YAML"),
        ("version: 2\n", "version 2"),
        ("version: 1\nextra: 1\n", "unknown keys"),
        ("rules: 3\n", "is a list"),
        ("rules: [3]\n", "rule 1 needs a 'query'"),
        ("rules:\n- {query: a}\n", "exactly one of"),
        ("rules:\n- {query: a, float: true, scheme: w8}\n", "exactly one of"),
        ("rules:\n- {query: a, float: false}\n", "true or absent"),
        ("rules:\n- {query: a, scheme: w8, arguments: {num_bits: 3}}\n", "belong to a quantizer"),
        ("rules:\n- {query: a, quantizer: os.system}\n", "unknown quantizer class"),
        ("rules:\n- {query: a, quantizer: QuantizedLinear}\n", "unknown quantizer class"),
        ("rules:\n- {query: a, quantizer: quantize_model}\n", "unknown quantizer class"),
        (
            "rules:\n- {query: a, quantizer: LinearQuantizer, arguments: {granularity: {Granularity: {}}}}\n",
            "unknown gran",
        ),
        (
            "rules:\n- {query: a, quantizer: LinearQuantizer, arguments: {granularity: {dataclasses: {}}}}\n",
            "unknown gran",
        ),
        (
            "rules:\n- {query: a, quantizer: LinearQuantizer, arguments: {granularity: {PerGroup: {x: 1}}}}\n",
            "argument",
        ),
        ("rules:\n- {query: a, quantizer: LinearQuantizer, arguments: {quantized_dtype: {dtype: nn}}}\n", "data type"),
        ("scheme: w9\n", "Known schemes"),
        ("rules:\n- {query: 'a//b', float: true}\n", "expected a name"),
        ("rules:\n- {query: 're:(', float: true}\n", "not a regular expression"),
        ("a: !!python/object/apply:os.system ['true']\n", "not a YAML"),
    ],
)
def test_wrong_yaml_is_a_value_error_that_says_where(text, reason):
    with pytest.raises(ValueError, match=reason):
        QuantizationConfig.from_yaml(text)


def test_configurations_copy_and_print():
    config = QuantizationConfig("w8").add_rule("a", None).add_rule(WEIGHTS, LinearQuantizer, num_bits=4)
    assert copy.deepcopy(config) == config
    assert repr(config).splitlines() == [
        "QuantizationConfig(scheme='w8'",
        "  'a': float",
        f"  {WEIGHTS!r}: LinearQuantizer(num_bits=4))",
    ]

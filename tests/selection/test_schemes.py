"""Schemes: which stub becomes which quantizer, and the reason that is printed."""

import io

import pytest
import torch
from torch import nn

from fastforward.nn.conv import QuantizedConv2d
from fastforward.nn.embedding import QuantizedEmbedding
from fastforward.nn.linear import QuantizedLinear
from fastforward.nn.linear_quantizer import LinearQuantizer
from fastforward.nn.module import QuantizedModule
from fastforward.nn.norm import QuantizedLayerNorm
from fastforward.nn.quantizer import QuantizerMetadata, QuantizerStub
from fastforward.quantization.granularity import PerChannel, PerGroup, PerTensor
from fastforward.selection import QuantizationConfig, Role, Scheme, schemes
from fastforward.selection.formats import Format
from fastforward.selection.quantizers import all_quantizers

ISSUE_NAMES = ("w8a8", "w8a8_dynamic", "w8", "w4_g128", "w4a8", "fp8", "fp8_dynamic", "a8", "w4a4")


def stub(tag, operator, argument=None, bits=None):
    return QuantizerStub(metadata=QuantizerMetadata((tag,), operator=operator, argument=argument, bits=bits))


class Attention(QuantizedModule):
    """As the rewriter makes it: stubs by variable and operator."""

    def __init_quantization__(self):
        self.quantizer_q = stub("activation/input", "matmul", "input")
        self.quantizer_k = stub("activation/input", "matmul", "other")
        self.quantizer_matmul = stub("activation/output", "matmul")
        self.quantizer_softmax = stub("activation/output", "softmax")
        self.quantizer_self_table = stub("parameter/weight", "matmul", "other")
        self.table = nn.Parameter(torch.zeros(4, 6))


@pytest.fixture
def net():
    return nn.ModuleDict(
        {
            "embed": QuantizedEmbedding(10, 128),
            "conv": QuantizedConv2d(3, 4, 3),
            "attention": Attention(),
            "norm": QuantizedLayerNorm(8),
            "linear": QuantizedLinear(256, 4),
            "odd": QuantizedLinear(30, 4, bias=False),
        }
    )


def chosen(net):
    found = all_quantizers(net).named_modules()
    return {name: quantizer for name, quantizer in found if not quantizer.is_stub()}


def test_w8a8_quantizes_the_operands_of_multiplications(net):
    schemes.get("w8a8").apply(net)
    found = chosen(net)
    assert {name: (q.num_bits, q.symmetric, q.granularity) for name, q in found.items()} == {
        "embed.weight_quantizer": (8, True, PerChannel(0)),
        "conv.input_quantizer": (8, False, PerTensor()),
        "conv.weight_quantizer": (8, True, PerChannel(0)),
        "attention.quantizer_q": (8, False, PerTensor()),
        "attention.quantizer_k": (8, False, PerTensor()),
        "attention.quantizer_self_table": (8, True, PerChannel(-1)),
        "linear.input_quantizer": (8, False, PerTensor()),
        "linear.weight_quantizer": (8, True, PerChannel(0)),
        "odd.input_quantizer": (8, False, PerTensor()),
        "odd.weight_quantizer": (8, True, PerChannel(0)),
    }
    assert found["linear.weight_quantizer"].quant_metadata.operator == "linear"


def test_groups_that_do_not_divide_the_axis_become_channels(net):
    schemes.get("w4_g128").apply(net)
    found = {name.split(".")[0]: (q.num_bits, q.granularity) for name, q in chosen(net).items()}
    assert found == {
        "embed": (4, PerGroup(128)),
        "linear": (4, PerGroup(128)),
        "conv": (4, PerChannel(0)),
        "odd": (4, PerChannel(0)),
        "attention": (4, PerChannel(-1)),
    }


def test_a_recorded_run_decides_instead_of_the_metadata(net):
    governing = {
        "norm.output_quantizer": Role("activation", "linear", "input"),
        "linear.weight_quantizer": Role("weight", "linear", "weight", 1),
    }
    schemes.get("w8a8").apply(net, governing)
    found = chosen(net)
    assert found.keys() == {"norm.output_quantizer", "linear.weight_quantizer", "embed.weight_quantizer"}
    assert found["linear.weight_quantizer"].granularity == PerChannel(1)


def test_pragmas_win_over_schemes_and_rules_over_pragmas(net):
    net.linear.weight_quantizer.quant_metadata.bits = 4
    net.odd.weight_quantizer.quant_metadata.add_tag("skip")
    schemes.get("w8a8").apply(net)
    assert net.linear.weight_quantizer.num_bits == 4 and net.linear.input_quantizer.num_bits == 8
    assert net.odd.weight_quantizer.is_stub()
    other = nn.Sequential(QuantizedLinear(4, 4))
    other[0].weight_quantizer.quant_metadata.bits = 4
    QuantizationConfig("w8").add_rule("0/weight_quantizer", LinearQuantizer, num_bits=6).apply(other)
    assert other[0].weight_quantizer.num_bits == 6


@pytest.mark.parametrize("name", schemes.names())
def test_every_scheme_applies_and_gives_a_reason_for_every_site(net, name):
    sites = all_quantizers(net).full_names()
    choices = schemes.get(name).apply(net)
    assert [choice.site for choice in choices] == sites
    assert all(choice.reason for choice in choices)
    assert any(choice.quantizer is not None for choice in choices)
    assert {choice.site for choice in choices if choice.quantizer is not None} == set(chosen(net))


def test_the_schemes_of_the_field_exist():
    assert set(ISSUE_NAMES) <= set(schemes.names())
    assert all(schemes.get(name).description for name in schemes.names())


@pytest.mark.parametrize("name", ["w8a9", "", "W8A8"])
def test_an_unknown_scheme_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="Known schemes: .*w8a8.*w8a8_dynamic") as caught:
        schemes.get(name)
    assert repr(name) in str(caught.value)


def test_schemes_are_given_by_name_or_record_and_can_be_added():
    mine = Scheme("mine", weight=Format(5))
    assert schemes.get(mine) is mine
    with pytest.raises(TypeError, match="not as int"):
        schemes.get(8)
    with pytest.raises(ValueError, match="already registered"):
        schemes.register(mine.with_changes(name="w8"))
    schemes.register(mine)
    try:
        assert schemes.get("mine") is mine
        schemes.register(mine.with_changes(weight=Format(6)), override=True)
        assert schemes.get("mine").weight.bits == 6
    finally:
        schemes._SCHEMES.pop("mine")


def test_a_scheme_can_be_limited_to_operators(net):
    schemes.get("w8").with_changes(operators=frozenset({"linear"})).apply(net)
    assert chosen(net).keys() == {"linear.weight_quantizer", "odd.weight_quantizer"}


def test_explain_prints_site_quantizer_and_reason(net):
    net.odd.input_quantizer = LinearQuantizer(7)
    schemes.get("w8").apply(nn.ModuleList([net["embed"], net["linear"]]))
    out = io.StringIO()
    choices = schemes.explain(net, file=out)
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.getvalue().splitlines()}
    assert len(choices) == len(lines) == len(all_quantizers(net))
    assert lines["embed.weight_quantizer"] == [
        "LinearQuantizer(8)",
        "scheme w8: weight of embedding(weight), int8 per channel, symmetric",
    ]
    assert lines["linear.input_quantizer"] == ["float", "scheme w8 leaves activations in float"]
    assert lines["linear.bias_quantizer"] == ["float", "bias of linear: added in the accumulator's precision"]
    assert lines["odd.input_quantizer"] == ["LinearQuantizer(7)", "set by hand"]
    assert lines["norm.input_quantizer"] == ["float", "no scheme was applied"]


def test_choices_do_not_touch_the_model(net):
    assert any(choice.quantizer for choice in schemes.get("w8a8").choices(net))
    assert chosen(net) == {}

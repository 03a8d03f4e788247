"""Queries over the module tree: the grammar, the extensions, and the collections that searches return."""

import pytest
import torch
from torch import nn

from fastforward.exceptions import QuantizationError
from fastforward.nn.linear import QuantizedLinear
from fastforward.selection import mpath


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.linear = QuantizedLinear(2, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


STUBS = ("input_quantizer", "weight_quantizer", "bias_quantizer", "output_quantizer")
BLOCK = ["", ".norm", ".linear", *(f".linear.{stub}" for stub in STUBS)]
EVERYTHING = ["layers", *(f"layers.{i}{name}" for i in "01" for name in BLOCK), "head", "head.0", "head.1"]


@pytest.fixture
def net():
    return Net()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("head", ["head"]),
        ("/head/", ["head"]),
        (" head / 1 ", ["head.1"]),
        ("head/*", ["head.0", "head.1"]),
        ("*", ["layers", "head"]),
        ("**", EVERYTHING),
        ("**/**", EVERYTHING),
        ("**/*", EVERYTHING),
        ("layers/1/norm", ["layers.1.norm"]),
        ("layers/*/norm", ["layers.0.norm", "layers.1.norm"]),
        ("**/norm", ["layers.0.norm", "layers.1.norm"]),
        ("layers/**/weight_quantizer", ["layers.0.linear.weight_quantizer", "layers.1.linear.weight_quantizer"]),
        ("layers/~0/norm", ["layers.1.norm"]),
        ("~layers", ["head"]),
        ("~~head", ["head"]),
        ("~{layers, nothing}", ["head"]),
        ("layers/0/{norm,linear}", ["layers.0.norm", "layers.0.linear"]),
        ("{layers/0/norm, head/{0,1}}", ["layers.0.norm", "head.0", "head.1"]),
        ("{layers, head}/1", ["layers.1", "head.1"]),
        ("[re:l.*]/[re:[01\\]]/[regex:n.*]", ["layers.0.norm", "layers.1.norm"]),
        ("**/[cls:torch.nn.Linear]", ["layers.0.linear", "layers.1.linear", "head.0"]),
        ("**/[class:Block]/norm", ["layers.0.norm", "layers.1.norm"]),
        ("**/~[cls:nn.Linear]/weight_quantizer", []),
        ("layers/0/**/[quantizer:parameter]", ["layers.0.linear.weight_quantizer", "layers.0.linear.bias_quantizer"]),
        ("layers/0/**/[qtag:activation, activation/input]", ["layers.0.linear.input_quantizer"]),
        ("nothing/here", []),
    ],
)
def test_a_query_selects_these_modules(net, query, expected):
    assert mpath.search(query, net).full_names() == expected


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "expected a name"),
        ("/", "expected a name"),
        ("a//b", "expected a name"),
        ("a b", "unexpected 'b'"),
        ("***", r"expected '\*'"),
        ("{a", "expected ','"),
        ("{}", "expected a name"),
        ("{a}}", "unexpected '}'"),
        ("[re:a", "expected '\\[tag:text\\]'"),
        ("[re]", "expected '\\[tag:text\\]'"),
        ("[re:(]", "not a regular expression"),
        ("[nope:a]", "unknown extension"),
        ("[cls:Nope]", "neither in the scope"),
        ("[cls:torch.manual_seed]", "not a class"),
        ("[quantizer:]", "at least one tag"),
        ("&nope", "unknown alias"),
        ("~**", "one level"),
        ("~{a/b,c}", "one level"),
    ],
)
def test_a_query_outside_the_grammar_is_refused_with_the_place(query, reason):
    with pytest.raises(mpath.MPathParseError, match=reason) as caught:
        mpath.query(query)
    if query:
        assert query in str(caught.value)
        assert 0 <= caught.value.position <= len(query)


def test_selectors_combine_as_whole_paths(net):
    linears, last = mpath.query("**/[cls:nn.Linear]"), mpath.query("layers/1/**")
    assert mpath.search(linears & last, net).full_names() == ["layers.1.linear"]
    assert mpath.search(linears | "head", net).full_names() == ["layers.0.linear", "layers.1.linear", "head", "head.0"]
    assert mpath.search("layers" / mpath.Wildcard() / "norm", net).full_names() == ["layers.0.norm", "layers.1.norm"]
    outside = mpath.search(~mpath.query("layers/**"), net).full_names()
    assert outside == ["head", "head.0", "head.1"]
    assert mpath.search(~~linears, net).full_names() == mpath.search(linears, net).full_names()
    short_names = mpath.root / mpath.Predicate(lambda name, module: len(name) == 1 and not list(module.children()))
    assert mpath.search(short_names, net).full_names() == ["head.0", "head.1"]
    assert mpath.search(mpath.root / mpath.Class((nn.ReLU, nn.LayerNorm)), net).full_names() == [
        "layers.0.norm",
        "layers.1.norm",
        "head.1",
    ]


def test_aliases_come_from_the_call_the_root_and_each_other(net):
    names = mpath.aliases(first="layers/0", weights="&first/**/[qtag:parameter/weight]")
    assert mpath.search("&weights", net, aliases=names).full_names() == ["layers.0.linear.weight_quantizer"]
    net.aliases = {"out": "head", "last": "&out/1"}
    assert mpath.search("&last", net).full_names() == ["head.1"]
    assert mpath.search("&last", net, aliases={"out": "layers"}).full_names() == ["layers.1"]
    with pytest.raises(mpath.MPathParseError, match="refers to itself"):
        mpath.search("&a", net, aliases={"a": "&b", "b": "&a"})
    net.aliases = 3
    assert mpath.search("head", net).full_names() == ["head"]


def test_class_names_resolve_in_the_scope_of_the_caller(net):
    Mine = nn.ReLU  # noqa: N806, F841
    assert mpath.search("**/[cls:Mine]", net).full_names() == ["head.1"]

    def elsewhere():
        return mpath.query("**/[cls:Mine]", context=mpath.caller_context())

    assert mpath.search(elsewhere(), net).full_names() == ["head.1"]
    context = mpath.QueryContext({"Mine": nn.LayerNorm})
    assert len(mpath.search(mpath.query("**/[cls:Mine]", context=context), net)) == 2
    assert mpath.local_context().resolve("Mine") is nn.ReLU


def test_extensions_can_be_added_and_are_not_replaced_by_accident(net):
    @mpath.mpath_query_extension("starts")
    class Starts(mpath.Fragment):
        def __init__(self, prefix):
            self.prefix = prefix

        @classmethod
        def from_raw_string(cls, raw):
            return cls(raw)

        def matches(self, name, module):
            return name.startswith(self.prefix)

    try:
        assert mpath.search("[starts:he]/*", net).full_names() == ["head.0", "head.1"]
        with pytest.raises(ValueError, match="taken"):
            mpath.register_mpath_query_extension("starts", Starts)
        mpath.register_mpath_query_extension("starts", Starts, override=True)
    finally:
        mpath.extensions._EXTENSIONS.pop("starts")
    with pytest.raises(TypeError, match="from_raw_string"):
        mpath.register_mpath_query_extension("thing", int)
    with pytest.raises(ValueError, match="identifier"):
        mpath.register_mpath_query_extension("a-b", Starts)


def test_results_say_where_they_were_found_and_by_what(net):
    (result,) = mpath.search("layers/*/[re:no.*]", net)[1:]
    assert (result.full_name, result.parent_attribute) == ("layers.1.norm", "norm")
    assert result.parent is net.layers[1] and result.module is net.layers[1].norm
    assert [str(fragment) for fragment in result.fragment_matches] == ["layers", "*", "[re:no.*]"]


def test_shared_modules_are_found_under_every_name_and_cycles_end():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.Sequential(shared))
    net.again = shared
    assert mpath.search("**/[cls:nn.Linear]", net).full_names() == ["0", "1.0", "again"]
    net[1].parent = net
    assert mpath.search("**/[cls:nn.Linear]", net).full_names() == ["0", "1.0", "again"]


def test_collections_are_sequences_and_sets(net):
    linears, head = mpath.search("**/[cls:nn.Linear]", net), mpath.search("head/*", net)
    assert (linears | head).full_names() == ["layers.0.linear", "layers.1.linear", "head.0", "head.1"]
    assert (linears & head).full_names() == ["head.0"]
    assert (linears - head).full_names() == ["layers.0.linear", "layers.1.linear"]
    assert (linears ^ head).full_names() == ["layers.0.linear", "layers.1.linear", "head.1"]
    assert [type(module) for module in head.modules()] == [nn.Linear, nn.ReLU]
    assert list(head.parents()) == [net.head]
    assert dict(head.named_modules()) == {"head.0": net.head[0], "head.1": net.head[1]}
    assert head.map(lambda name, module: name) == ["head.0", "head.1"]
    relu = head[1]
    del head[1]
    assert head.full_names() == ["head.0"]
    head.append(relu)
    head.append(relu)
    assert head[1:].full_names() == ["head.1"] and len(head) == 2
    with pytest.raises(TypeError, match="FilterResult"):
        head.append(relu.module)
    with pytest.raises(ValueError, match="different roots"):
        head | mpath.search("**", Net())


def test_apply_replaces_modules_and_refuses_a_tree_that_changed(net):
    found = mpath.search("head/1", net)
    seen = found.apply(lambda name, module: nn.GELU(), update=False)
    assert isinstance(seen[0].module, nn.GELU) and isinstance(net.head[1], nn.ReLU)
    found.apply(lambda name, module: nn.GELU())
    assert isinstance(net.head[1], nn.GELU) and found[0].module is net.head[1]
    net.head[1] = nn.Tanh()
    with pytest.raises(QuantizationError, match=r"changed since the search at head\.1"):
        found.apply(lambda name, module: nn.ReLU())
    assert isinstance(net.head[1], nn.Tanh)
    found.apply(lambda name, module: nn.ReLU(), safe=False)
    assert isinstance(net.head[1], nn.ReLU)


def test_what_is_shared_stays_shared_when_replaced():
    shared = nn.ReLU()
    net = nn.Sequential(shared, nn.Linear(2, 2), shared)
    mpath.search("**/[cls:nn.ReLU]", net).apply(lambda name, module: nn.GELU())
    assert isinstance(net[0], nn.GELU) and net[0] is net[2]


def test_a_model_without_quantizers_can_be_searched():
    assert mpath.search("**/[quantizer:parameter]", nn.Sequential(torch.nn.ReLU())).full_names() == []

